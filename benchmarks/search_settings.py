"""Scores and speed of search settings: the tables of docs/search.md.

Captions every image of a split with the trained model of a run, once for each setting, and scores the captions. A run
is a folder with `tokens`, `features`, `model` and optionally `ensemble`, such as `data` after `dvc repro`. Every round
measures each setting once; images per second include reading the features and are medians over rounds.
"""

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple, get_args

import torch

from pipeline.captions.records import Split
from pipeline.captions.tokens import TOKENS_FILE, group_references, read_tokens
from pipeline.decoder.model_io import TrainedModel
from pipeline.device import setup_device
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.generation.caption_io import GeneratedCaptions
from pipeline.generation.ensemble import read_models
from pipeline.generation.generate import generate
from pipeline.generation.search import SearchParams
from pipeline.metrics import bleu, cider

MAX_LENGTH, BATCH_SIZE, ROUNDS = 30, 64, 3

SETTINGS: Sequence[Mapping[str, Any]] = (
    {"beam_size": 1},
    {"beam_size": 3},
    {"beam_size": 5},
    {"beam_size": 10},
    {"beam_size": 3, "length_normalization": "average", "length_alpha": 0.8},
    {"beam_size": 5, "length_normalization": "average", "length_alpha": 0.5, "no_repeat_ngram_size": 4},
    {"beam_size": 5, "length_normalization": "average", "length_alpha": 0.8},
    {"beam_size": 5, "length_normalization": "average", "length_alpha": 1.0},
    {"beam_size": 5, "length_normalization": "gnmt", "length_alpha": 0.8},
    {"beam_size": 5, "no_repeat_ngram_size": 3},
    {"beam_size": 6, "num_groups": 3, "diversity_penalty": 0.5},
    {"beam_size": 5, "precision": "bfloat16"},
    {"method": "sample"},
    {"method": "sample", "temperature": 0.5},
    {"method": "sample", "top_k": 10},
    {"method": "sample", "top_p": 0.9},
)
"""Changes to greedy search."""


class Row(NamedTuple):
    """Results of one setting."""

    bleu4: float
    cider_d: float
    distinct_captions: int
    mean_length: float
    images_per_second: float


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search_settings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("data")], help="run folders (default: data)")
    parser.add_argument("--split", choices=get_args(Split), default="test", help="split to caption (default: test)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of measurement (default: %(default)s)")
    parser.add_argument(
        "--device",
        default=os.environ.get("GRIDCAP_DEVICE", "auto"),
        help="auto, cpu, cuda or cuda:N (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    device = setup_device(arguments.device)
    try:
        for run in arguments.runs:
            print("\n".join(table(run, arguments.split, arguments.rounds, device)), flush=True)
    except UserError as error:
        parser.exit(UserError.exit_status, f"error: {error}\n")


def table(run: Path, split: Split, rounds: int, device: torch.device) -> Iterator[str]:
    """Yield the lines of one run's table."""
    ensemble = run / "ensemble"
    models = read_models(run / "model", ensemble if ensemble.is_dir() else None)
    store = FeatureStore(run / "features", fingerprint=models[0].config.encoder_fingerprint)
    image_references = group_references(read_tokens(run / "tokens" / TOKENS_FILE, split))
    rows = measure(models, store, image_references, rounds, device)
    num_words, num_regions = len(models[0].vocabulary), store.grid_shape[0]
    yield f"{len(image_references)} images of {split}, vocabulary of {num_words} words, {num_regions} regions per image"
    yield ""
    yield "| search settings | BLEU-4 | CIDEr-D | distinct captions | words per caption | images per second |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for changes, row in zip(SETTINGS, rows, strict=True):
        yield (
            f"| {label(changes)} | {row.bleu4:.3f} | {row.cider_d:.3f} | {row.distinct_captions} "
            f"| {row.mean_length:.1f} | {row.images_per_second:.0f} |"
        )


def label(changes: Mapping[str, Any]) -> str:
    """Name a setting by its changes to greedy search."""
    return " ".join(f"`{key}={value}`" for key, value in changes.items())


def measure(
    models: Sequence[TrainedModel],
    store: FeatureStore,
    image_references: Mapping[int, Sequence[Sequence[str]]],
    rounds: int,
    device: torch.device,
) -> list[Row]:
    """Caption and score the images with each setting.

    Args:
        models: One model, or an ensemble.
        store: Features of the images.
        image_references: Reference captions of each image to caption, as words, by image id.
        rounds: Number of times to caption the images.
        device: Device to decode on.

    Returns:
        A row for each of `SETTINGS`.
    """
    image_ids = list(image_references)
    generated: list[list[GeneratedCaptions]] = [[] for _ in SETTINGS]
    seconds: list[list[float]] = [[] for _ in SETTINGS]
    for _ in range(rounds):
        for index, changes in enumerate(SETTINGS):
            search = replace(SearchParams.greedy(MAX_LENGTH), seed=1, **changes)
            start = time.perf_counter()
            generated[index] = list(generate(models, store, image_ids, search, BATCH_SIZE, device))
            seconds[index].append(time.perf_counter() - start)
    all_references = [image_references[image_id] for image_id in image_ids]
    rows = []
    for images, times in zip(generated, seconds, strict=True):
        captions = [image.words for image in images]
        rows.append(
            Row(
                bleu4=float(bleu.bleu(bleu.bleu_counts(captions, all_references).sum(axis=0))[3]),
                cider_d=float(cider.cider(captions, all_references).cider_d.mean()),
                distinct_captions=len(set(captions)),
                mean_length=mean(map(len, captions)),
                images_per_second=len(captions) / median(times),
            )
        )
    return rows


if __name__ == "__main__":
    main()
