"""The results of a run: scores as JSON, curves and attention as pictures, and the report."""

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

from pipeline.artifacts import write_atomically, write_json
from pipeline.captions.records import Record, Split, read_records
from pipeline.captions.tokens import TOKENS_FILE, CaptionTokens, read_tokens, references, tokenizer_description
from pipeline.captions.vocabulary import SPECIALS, Vocabulary
from pipeline.decoder.model_io import HISTORY_FILE, TrainedModel, read_model
from pipeline.errors import UserError
from pipeline.evaluation.agreement import agreement
from pipeline.evaluation.scene_scores import score_scenes
from pipeline.features.images import read_image
from pipeline.features.store import FeatureStore
from pipeline.generation.caption_io import GeneratedCaptions, read_captions
from pipeline.metrics import token_accuracy as token_metrics
from pipeline.metrics.bootstrap import Resampling
from pipeline.metrics.caption_scores import MetricTables, image_rows, measure, summary
from pipeline.metrics.corpus import Corpus
from pipeline.metrics.diversity import PROTOCOL as DIVERSITY_PROTOCOL
from pipeline.metrics.diversity import diversity
from pipeline.metrics.tokenizers import TokenizerName, corpora
from pipeline.params import params_section
from pipeline.report.examples import ReportParams, examples
from pipeline.report.figures import attention_strip, curves
from pipeline.report.report import Report, write_report
from pipeline.training.batches import CaptionBatches
from pipeline.training.teacher_forcing import evaluate_split

PICTURE_SIZE = 224
"""Side in px at which pictures are drawn under their attention."""


@params_section
class EvaluateParams:
    """What is computed besides the scores that always are."""

    tokenizer: TokenizerName
    """Whose words are compared: `plain` the pipeline's own, `ptb` those that coco-caption makes, which takes Java."""
    meteor: bool
    """Whether METEOR is computed, which takes Java and some seconds; where Java is absent the results say so."""
    spice: bool
    """Whether SPICE is, which takes Java 8 to 14 and Stanford's parser; where either is absent the results say so."""
    human_meteor: bool
    """Whether human agreement is told in METEOR too, which is slow: twice as many captions as there are references."""
    bootstrap_samples: Annotated[int, Field(ge=100)]
    """Resamples of the images that 95% intervals are made of."""
    attention_plots: Annotated[int, Field(ge=0)]
    """Images, drawn at random, whose attention is shown word by word."""
    report: ReportParams
    """Which images the report shows."""
    seed: Annotated[int, Field(ge=0)]
    """Fixes which images are drawn at random, for either, and the resamples."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The artifacts that are evaluated."""

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
    report: Path,
    run_params: Mapping[str, Any],
    device: torch.device,
    batch_size: int,
) -> None:
    """Write scores and counts into `metrics`, curves and pictures into `plots`.

    The former are `scores.json`, `captions.json` (what the captions are like, and how well people agree),
    `images.jsonl` (the scores of each image), `teacher_forcing.json` and `scenes.json`.
    The page `report` shows it all, and `run_params`: all sections of the params file, as plain values.

    Raises `UserError` where an artifact is missing or damaged, they do not belong together, or the protocol cannot be
    followed.
    """
    records = read_records(inputs.prepared, split)
    captions = read_tokens(inputs.tokens / TOKENS_FILE, split)
    model = read_model(inputs.model)
    store = FeatureStore(inputs.features, fingerprint=model.config.encoder_fingerprint)
    generated = {caption.image_id: caption for caption in read_captions(inputs.generated)}
    _check_same_images(records, generated, inputs.generated)

    corpus = _corpus(params.tokenizer, records, captions, generated, inputs.tokens)
    resampling = Resampling(bootstrap_samples=params.bootstrap_samples, seed=params.seed)
    measured = measure(corpus, params.meteor, params.spice)
    scores = summary(measured, _subsets(records), resampling)
    write_json(metrics / "scores.json", scores)
    trained_on = read_tokens(inputs.tokens / TOKENS_FILE, "train")
    about = {
        "diversity": _diversity(generated, captions, trained_on, model.vocabulary),
        "human_agreement": agreement(corpus, params.meteor and params.human_meteor, resampling),
    }
    write_json(metrics / "captions.json", about)
    write_atomically(metrics / "images.jsonl", _image_lines(measured, generated))

    batches = CaptionBatches(captions, store, batch_size)
    forcing = _teacher_forcing(model, batches, device)
    write_json(metrics / "teacher_forcing.json", forcing)

    grid = store.spec.grid
    scenes = score_scenes(records, generated, grid)
    write_json(metrics / "scenes.json", scenes)

    history = json.loads((inputs.model / HISTORY_FILE).read_text(encoding="utf-8"))
    write_json(plots / "training.json", history)
    curves(history, plots, ".png")
    _draw(records, generated, grid, params, inputs.images, plots / "attention")

    own_scores = {
        image_id: {name: float(of_images[row]) for name, of_images in measured.images.items()}
        for row, image_id in enumerate(measured.image_ids)
    }
    write_report(
        report,
        Report(
            split=split,
            examples=examples(
                records, generated, own_scores, grid, store.views[0], inputs.images, params.report, params.seed
            ),
            scores=scores,
            captions=about,
            teacher_forcing=forcing,
            scenes=scenes,
            history=history,
            params=run_params,
        ),
    )


def _corpus(
    tokenizer: TokenizerName,
    records: Sequence[Record],
    captions: CaptionTokens,
    generated: Mapping[int, GeneratedCaptions],
    tokens: Path,
) -> Corpus:
    if tokenizer == "ptb":
        texts = {record.image_id: record.captions for record in records}
        return corpora("ptb", texts, [{image_id: " ".join(one.words) for image_id, one in generated.items()}])[0]
    words = references(captions)
    image_ids = tuple(sorted(generated))
    return Corpus(
        image_ids=image_ids,
        hypotheses=tuple(generated[image_id].words for image_id in image_ids),
        references=tuple(words[image_id] for image_id in image_ids),
        tokens=f"plain, {tokenizer_description(tokens / TOKENS_FILE)}",
    )


def _subsets(records: Sequence[Record]) -> dict[str, list[int]]:
    subsets: dict[str, list[int]] = {}
    for record in records:
        if record.subset is not None:
            subsets.setdefault(record.subset, []).append(record.image_id)
    return subsets


def _diversity(
    generated: Mapping[int, GeneratedCaptions],
    captions: CaptionTokens,
    trained_on: CaptionTokens,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    known = set(vocabulary.words[len(SPECIALS) :])
    seen = {tuple(caption.split(" ")) for caption in trained_on.captions}
    of_people = [of_image[0] for of_image in references(captions).values()]
    return {
        "generated": diversity([caption.words for caption in generated.values()], known, seen),
        "reference": diversity(of_people, known, seen),
        "protocol": list(DIVERSITY_PROTOCOL),
    }


def _image_lines(measured: MetricTables, generated: Mapping[int, GeneratedCaptions]) -> str:
    rows = [{**row, "caption": " ".join(generated[int(row["image_id"])].words)} for row in image_rows(measured)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _check_same_images(records: Sequence[Record], generated: Mapping[int, GeneratedCaptions], folder: Path) -> None:
    wanted = {record.image_id for record in records}
    if wanted != generated.keys():
        raise UserError(
            f"{folder}: captions {len(generated)} images, of which {len(wanted & generated.keys())} are among the "
            f"{len(wanted)} to be scored; run `dvc repro generate`"
        )


def _teacher_forcing(model: TrainedModel, batches: CaptionBatches, device: torch.device) -> dict[str, Any]:
    forced = evaluate_split(model.decoder.to(device), batches, device)
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
    generated: Mapping[int, GeneratedCaptions],
    grid: tuple[int, int],
    params: EvaluateParams,
    images: Path,
    folder: Path,
) -> None:
    chosen = random.Random(params.seed).sample(records, min(params.attention_plots, len(records)))
    folder.mkdir(parents=True, exist_ok=True)
    for record in tqdm(chosen, desc="evaluate: attention", unit="picture"):
        caption = generated[record.image_id]
        maps = caption.attention.reshape(-1, *grid)
        picture = read_image(images / record.file, PICTURE_SIZE)
        attention_strip(picture, caption.words, maps, folder / f"{record.image_id}.png")
