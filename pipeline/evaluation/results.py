"""The results of a run: scores as JSON, curves and attention as pictures."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from tqdm import tqdm

from pipeline.captions.records import Record, Split, read_records
from pipeline.captions.tokens import TOKENS_FILE, read_tokens, references, tokens_protocol
from pipeline.decoder.batches import CaptionBatches
from pipeline.decoder.forcing import teacher_forced
from pipeline.decoder.generated import Generated, read_generated
from pipeline.decoder.saved import HISTORY_FILE, SavedModel, read_model
from pipeline.errors import UserError
from pipeline.evaluation import tokens as token_metrics
from pipeline.evaluation.caption_scores import score_captions
from pipeline.evaluation.plots import attention_strip, curves
from pipeline.evaluation.scene_scores import score_scenes
from pipeline.features.images import read_image
from pipeline.features.store import FeatureStore
from pipeline.params import section
from pipeline.publish import write_json

PICTURE_SIZE = 224
"""Side in px at which pictures are drawn under their attention."""


@section
class EvaluateParams:
    """What is computed besides the scores that always are."""

    meteor: bool
    """Whether METEOR is computed, which takes Java and some seconds; where Java is absent the results say so."""
    pictures: Annotated[int, Field(ge=0)]
    """Images, drawn at random, whose attention is shown word by word."""
    seed: int
    """Fixes which images those are."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The artefacts that are evaluated."""

    prepared: Path
    images: Path
    tokens: Path
    features: Path
    model: Path
    generated: Path


def evaluate(
    params: EvaluateParams,
    split: Split,
    inputs: Inputs,
    metrics: Path,
    plots: Path,
    device: torch.device,
    images_a_batch: int,
) -> None:
    """Write `scores.json`, `teacher_forcing.json` and `scenes.json` into `metrics`, curves and pictures into `plots`.

    Raises `UserError` where an artefact is missing or damaged, or they do not belong together.
    """
    records = read_records(inputs.prepared, split)
    captions = read_tokens(inputs.tokens / TOKENS_FILE, split)
    model = read_model(inputs.model)
    store = FeatureStore(inputs.features, fingerprint=model.config.encoder["fingerprint"])
    generated = {caption.image_id: caption for caption in read_generated(inputs.generated)}
    _check_same_images(records, generated, inputs.generated)

    subsets: dict[str, list[int]] = {}
    for record in records:
        if record.subset is not None:
            subsets.setdefault(record.subset, []).append(record.image_id)
    protocol = tokens_protocol(inputs.tokens / TOKENS_FILE)
    hypotheses = {image_id: caption.words for image_id, caption in generated.items()}
    scores = score_captions(hypotheses, references(captions), subsets, protocol, params.meteor)
    write_json(metrics / "scores.json", scores)

    batches = CaptionBatches(captions, store, images_a_batch)
    write_json(metrics / "teacher_forcing.json", _teacher_forcing(model, batches, device))

    grid = store.setting.grid
    write_json(metrics / "scenes.json", score_scenes(records, generated, grid))

    history = json.loads((inputs.model / HISTORY_FILE).read_text(encoding="utf-8"))
    write_json(plots / "training.json", history)
    curves(history, plots, ".png")
    _draw(records, generated, grid, params, inputs.images, plots / "attention")


def _check_same_images(records: Sequence[Record], generated: Mapping[int, Generated], folder: Path) -> None:
    wanted = {record.image_id for record in records}
    if wanted != generated.keys():
        raise UserError(
            f"{folder}: captions {len(generated)} images, of which {len(wanted & generated.keys())} are among the "
            f"{len(wanted)} to be scored; run `dvc repro generate`"
        )


def _teacher_forcing(model: SavedModel, batches: CaptionBatches, device: torch.device) -> dict[str, Any]:
    forced = teacher_forced(model.decoder.to(device), batches, device)
    scores = token_metrics.token_scores(forced.predicted, forced.target)
    protocol = [f"{key}: {said}" for key, said in token_metrics.PROTOCOL.items()]
    values = {
        "loss": forced.loss,
        "perplexity": math.exp(forced.loss),
        "accuracy": scores.accuracy,
        "macro_f1": scores.macro_f1,
        "weighted_f1": scores.weighted_f1,
    }
    return {
        "words": len(forced.target),
        **{name: round(value, 6) for name, value in values.items()},
        "protocol": [*protocol, "loss: mean cross-entropy in nats a word; <end> is a word, rare words are <unk>"],
    }


def _draw(
    records: Sequence[Record],
    generated: Mapping[int, Generated],
    grid: tuple[int, int],
    params: EvaluateParams,
    images: Path,
    folder: Path,
) -> None:
    chosen = random.Random(params.seed).sample(records, min(params.pictures, len(records)))
    folder.mkdir(parents=True, exist_ok=True)
    for record in tqdm(chosen, desc="evaluate: attention", unit="picture"):
        caption = generated[record.image_id]
        maps = caption.attention.reshape(-1, *grid)
        picture = read_image(images / record.file, PICTURE_SIZE)
        attention_strip(picture, caption.words, maps, folder / f"{record.image_id}.png")
