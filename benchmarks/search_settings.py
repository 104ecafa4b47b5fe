"""Search settings against scores and speed: the table of the README.

Captions every image of a split by the trained model of a run, once for each setting, and scores the captions. A run is
a folder with `tokens`, `features` and `model`, such as `data` is after `dvc repro`. Images a second include reading the
features; the settings take turns in rounds, of which the median counts.
"""

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from pipeline.captions.records import Split
from pipeline.captions.tokens import TOKENS_FILE, read_tokens, references
from pipeline.decoder.model_io import TrainedModel
from pipeline.device import setup_device
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.generation.caption_io import GeneratedCaptions
from pipeline.generation.ensemble import read_models
from pipeline.generation.generate import generate
from pipeline.generation.search import SearchParams
from pipeline.metrics import bleu, cider

MAX_WORDS, BATCH, ROUNDS = 30, 64, 3
BEAM = {"beam_size": 5}
AVERAGE = {**BEAM, "length_normalization": "average"}
SAMPLE = {"method": "sample"}

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "beam 3": {"beam_size": 3},
    "beam 5": BEAM,
    "beam 10": {"beam_size": 10},
    "beam 3, average to the power 0.8": {**AVERAGE, "beam_size": 3, "length_alpha": 0.8},
    "beam 5, average to the power 0.5, no four words twice": {
        **AVERAGE,
        "length_alpha": 0.5,
        "no_repeat_ngram_size": 4,
    },
    "beam 5, average to the power 0.8": {**AVERAGE, "length_alpha": 0.8},
    "beam 5, average": {**AVERAGE, "length_alpha": 1.0},
    "beam 5, GNMT to the power 0.8": {**BEAM, "length_normalization": "gnmt", "length_alpha": 0.8},
    "beam 5, no three words twice": {**BEAM, "no_repeat_ngram_size": 3},
    "beam 6 in 3 groups, diversity 0.5": {"beam_size": 6, "num_groups": 3, "diversity_penalty": 0.5},
    "beam 5, bfloat16": {**BEAM, "precision": "bfloat16"},
    "sample": SAMPLE,
    "sample, temperature 0.5": {**SAMPLE, "temperature": 0.5},
    "sample, the 10 likeliest": {**SAMPLE, "top_k": 10},
    "sample, nucleus 0.9": {**SAMPLE, "top_p": 0.9},
}


class Row(NamedTuple):
    """What one setting gave."""

    bleu4: float
    cider_d: float
    distinct: int
    words: float
    images_a_second: float


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search_settings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("data")], help="folders of runs; without any, data")
    parser.add_argument("--split", choices=["train", "val", "test"], default="test")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", default=os.environ.get("GRIDCAP_DEVICE", "auto"), help="auto, cpu or cuda")
    arguments = parser.parse_args(flags)
    try:
        for run in arguments.runs:
            print("\n".join(table(run, arguments.split, arguments.rounds, setup_device(arguments.device))), flush=True)
    except UserError as error:
        parser.exit(UserError.exit_status, f"error: {error}\n")


def table(run: Path, split: Split, rounds: int, device: torch.device) -> Iterator[str]:
    """The lines of one run."""
    models = read_models(run / "model", run / "ensemble")
    store = FeatureStore(run / "features", fingerprint=models[0].config.encoder_fingerprint)
    wanted = references(read_tokens(run / "tokens" / TOKENS_FILE, split))
    found = measured(models, store, wanted, rounds, device)
    yield f"{len(wanted)} images of {split}, {len(models[0].vocabulary)} words, {store.grid_shape[0]} regions each"
    yield ""
    yield "| search | BLEU-4 | CIDEr-D | distinct captions | words | images a second |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, row in found.items():
        yield (
            f"| {name} | {row.bleu4:.3f} | {row.cider_d:.3f} | {row.distinct} | {row.words:.1f} "
            f"| {row.images_a_second:.0f} |"
        )


def measured(
    models: Sequence[TrainedModel],
    store: FeatureStore,
    wanted: Mapping[int, Sequence[Sequence[str]]],
    rounds: int,
    device: torch.device,
) -> dict[str, Row]:
    image_ids = list(wanted)
    captions: dict[str, list[GeneratedCaptions]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name, changes in SETTINGS.items():
            search = replace(SearchParams.greedy(MAX_WORDS), seed=1, **changes)
            began = time.perf_counter()
            captions[name] = list(generate(models, store, image_ids, search, BATCH, device))
            seconds[name].append(time.perf_counter() - began)
    people = [wanted[image_id] for image_id in image_ids]
    return {
        name: Row(
            bleu4=float(bleu.bleu(bleu.bleu_counts([one.words for one in found], people).sum(axis=0))[3]),
            cider_d=float(cider.cider([one.words for one in found], people).cider_d.mean()),
            distinct=len({one.words for one in found}),
            words=mean(len(one.words) for one in found),
            images_a_second=len(found) / median(seconds[name]),
        )
        for name, found in captions.items()
    }


if __name__ == "__main__":
    main()
