"""Stage `evaluate`, steps `score` and `analyze`: scores and statistics of the generated captions of a split.

The steps `draw` and `write_report` are in `pipeline.report`.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from pipeline.artifacts import write_atomically, write_json
from pipeline.captions.languages import join_words
from pipeline.captions.records import AnnotatedObject, Record, Split, read_records
from pipeline.captions.tokens import (
    TOKENS_FILE,
    CaptionTokens,
    group_references,
    read_tokenization,
    read_tokens,
    require_vocabulary,
)
from pipeline.captions.vocabulary import SPECIALS
from pipeline.decoder.model_io import History, TrainedModel, read_history, read_model, read_refine_history
from pipeline.errors import UserError
from pipeline.evaluation.agreement import human_agreement
from pipeline.evaluation.scene_scores import score_scenes
from pipeline.features.images import upright_size
from pipeline.features.store import FeatureStore
from pipeline.features.views import relative_box
from pipeline.generation.caption_io import (
    TRAINED_CAPTIONS_FILE,
    GeneratedCaptions,
    read_captions,
    read_trained_captions,
)
from pipeline.metrics import token_accuracy
from pipeline.metrics.bootstrap import Resampling
from pipeline.metrics.caption_scores import (
    CORPUS_SCORES,
    MetricTables,
    compute_metrics,
    group_subsets,
    paired_differences,
    per_image_scores,
    summarize_scores,
)
from pipeline.metrics.corpus import Corpus, Words
from pipeline.metrics.diversity import PROTOCOL as DIVERSITY_PROTOCOL
from pipeline.metrics.diversity import diversity
from pipeline.metrics.java import UnavailableError
from pipeline.metrics.tokenizers import TokenizerName, build_corpora
from pipeline.metrics.word_kinds import TAGGER, word_kinds
from pipeline.metrics.word_usage import PROTOCOL as WORD_USAGE_PROTOCOL
from pipeline.metrics.word_usage import Usage, human_word_usage, word_usage
from pipeline.params import params_section, to_plain
from pipeline.training.batches import CaptionBatches
from pipeline.training.teacher_forcing import evaluate_split

_MAX_LOSS = math.log(sys.float_info.max)
"""Loss of the largest perplexity that a float can hold."""
MAX_ROWS = 12
"""Rows of each table of words in `captions.json`."""


@params_section
class PublishedScores:
    """Scores of a paper or repository, which the report and the model card show next to those of the run."""

    system: str
    """Name of the system."""
    source: str
    """Paper, or repository, that reports the scores."""
    data: str
    """Dataset and split of the scores."""
    notes: str | None
    """What differs from this run, such as the encoder; null if nothing is known."""
    scores: dict[str, Annotated[float, Field(ge=0)]]
    """Score by metric, with the names and units of `scores.json`: BLEU-4 of 19.5 points is 0.195. The CIDEr of
    coco-caption is `CIDEr-D`."""

    def __post_init__(self) -> None:
        for metric, value in self.scores.items():
            if metric not in CORPUS_SCORES:
                raise ValueError(f"scores has the unknown metric {metric!r}. Valid metrics: {', '.join(CORPUS_SCORES)}")
            if value > (maximum := 10 if metric.startswith("CIDEr") else 1):
                raise ValueError(f"{metric} must be <= {maximum}, not in points, got {value:g}")


@params_section
class ReportParams:
    """Images shown in the report."""

    best: Annotated[int, Field(ge=0, le=1000)]
    """Number of images with the highest CIDEr-D; 0 omits the group."""
    worst: Annotated[int, Field(ge=0, le=1000)]
    """Number of images with the lowest CIDEr-D; 0 omits the group."""
    random: Annotated[int, Field(ge=0, le=1000)]
    """Number of random images; 0 omits the group."""


@params_section
class EvaluateParams:
    """Settings of the evaluation."""

    tokenizer: TokenizerName
    """Tokenizer of the scores: `spacy` (the tokens of the pipeline) or `ptb` (coco-caption's; English, needs Java)."""
    meteor: bool
    """Compute METEOR, for English. Needs Java; without it METEOR is reported as unavailable."""
    spice: bool
    """Compute SPICE, for English. Needs Java 8 to 14 and Stanford CoreNLP 3.6.0; without them SPICE is reported as
    unavailable."""
    human_meteor: bool
    """Also compute METEOR of human agreement; slow. Needs `meteor`."""
    bootstrap_samples: Annotated[int, Field(ge=100, le=100_000)]
    """Number of bootstrap samples for the 95% intervals."""
    attention_plots: Annotated[int, Field(ge=0, le=1000)]
    """Number of random images whose attention is plotted; 0 disables the plots."""
    report: ReportParams
    """Images shown in the report."""
    published: tuple[PublishedScores, ...]
    """Published scores to compare with; empty for none."""
    seed: Annotated[int, Field(ge=0)]
    """Seed of the random images and of the bootstrap samples."""

    @property
    def resampling(self) -> Resampling:
        """Bootstrap settings."""
        return Resampling(bootstrap_samples=self.bootstrap_samples, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class EvaluateInputs:
    """Paths that the stage reads."""

    prepared: Path
    """Folder of records, from `prepare`."""
    image_dir: Path
    """Image folder of the dataset."""
    tokens: Path
    """Folder of tokens, from `tokenize`."""
    features: Path
    """Feature store, from `encode`."""
    model: Path
    """Model folder, from `refine`."""
    generated: Path
    """Folder of captions and attention, from `generate`."""


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """The artifacts of one split, checked to belong together."""

    split: Split
    records: Sequence[Record]
    """Records of the split, without the images that `encode` skipped."""
    num_skipped_images: int
    """Number of images of the split that `encode` skipped."""
    generated: Mapping[int, GeneratedCaptions]
    """Generated captions by image id, in the order of the file."""
    trained_captions: Mapping[int, tuple[str, ...]] | None
    """Words of the captions of the model before refinement, by image id; None if it is not refined."""
    tokens: CaptionTokens
    """Tokenized references of the split."""
    train_captions: frozenset[str]
    """Captions of the train split and of the text: words joined by spaces."""
    store: FeatureStore
    """Features of the images."""
    model: TrainedModel
    """The trained decoder with its vocabulary."""
    history: History
    """Metrics of each epoch of `train`."""
    refine_history: History
    """Metrics of each epoch of `refine`; empty if the model is not refined."""
    inputs: EvaluateInputs
    """Paths that the artifacts were read from."""

    def visible_objects(self, record: Record) -> Sequence[AnnotatedObject]:
        """Return the annotated objects of an image, with boxes relative to the part that the grid covers.

        Raises:
            UserError: The image is unreadable.
        """
        view, frame = self.store.views[0], self.store.spec.frame
        if not record.objects or (view == "whole" and frame.center_crop is None):
            return record.objects
        width, height = upright_size(self.inputs.image_dir / record.file)
        visible = frame.visible_box(width, height, view)
        return [replace(item, box=relative_box(item.box, visible, width, height, view)) for item in record.objects]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of the generated captions."""

    corpus: Corpus
    """Tokenized captions and references."""
    metrics: MetricTables
    """Counts and scores of each image."""
    summary: dict[str, Any]
    """Content of `scores.json`."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Statistics beyond the scores."""

    captions: dict[str, Any]
    """Content of `captions.json`: diversity, also before refinement, word usage and human agreement."""
    teacher_forcing: dict[str, Any]
    """Content of `teacher_forcing.json`."""
    scenes: dict[str, Any]
    """Content of `scenes.json`."""


def read_inputs(inputs: EvaluateInputs, split: Split) -> EvaluationData:
    """Read the artifacts of a split.

    Args:
        inputs: Paths of the artifacts.
        split: Split that `generate` captioned.

    Raises:
        UserError: An artifact is missing or damaged, or the artifacts do not belong together.
    """
    model = read_model(inputs.model)
    store = FeatureStore(inputs.features, fingerprint=model.config.encoder_fingerprint, verify_reads=True)
    skipped_ids = store.skipped_ids
    all_records = read_records(inputs.prepared, split)
    records = [record for record in all_records if record.image_id not in skipped_ids]
    require_vocabulary(inputs.tokens / TOKENS_FILE, model.vocabulary)
    data = EvaluationData(
        split=split,
        records=records,
        num_skipped_images=len(all_records) - len(records),
        generated={image.image_id: image for image in read_captions(inputs.generated, model.vocabulary.language)},
        trained_captions=None if model.config.refinement is None else read_trained_captions(inputs.generated),
        tokens=read_tokens(inputs.tokens / TOKENS_FILE, split, skipped_ids),
        train_captions=frozenset(
            read_tokens(inputs.tokens / TOKENS_FILE, "train", skipped_ids).captions
            + read_tokens(inputs.tokens / TOKENS_FILE, "text").captions
        ),
        store=store,
        model=model,
        history=read_history(inputs.model, model.config),
        refine_history=read_refine_history(inputs.model, model.config),
        inputs=inputs,
    )
    expected = {record.image_id for record in data.records}
    if expected != data.generated.keys():
        raise UserError(
            f"{inputs.generated}: has captions of {len(expected & data.generated.keys())} of the {len(expected)} "
            f"images of split {split}, and of {len(data.generated.keys() - expected)} other images. "
            "Run `dvc repro generate`."
        )
    if data.trained_captions is not None and data.trained_captions.keys() != expected:
        raise UserError(
            f"{inputs.generated / TRAINED_CAPTIONS_FILE}: has captions of other images than those of split {split}."
            " Run `dvc repro generate`."
        )
    return data


def score(data: EvaluationData, params: EvaluateParams, folder: Path) -> Scores:
    """Score the generated captions.

    Writes `scores.json` and `images.jsonl`, which has one line per image. If the model is refined, `scores.json` also
    has the scores before refinement and the paired differences. It lists the published scores of `params`.

    Args:
        data: Artifacts of the split.
        params: Settings of the evaluation.
        folder: Output folder.

    Raises:
        UserError: The tokenizer is `ptb`, and Java is missing or fails, or the captions are not English.
    """
    words = {image_id: captions.words for image_id, captions in data.generated.items()}
    corpus = _build_corpus(data, words, params.tokenizer)
    metrics = compute_metrics(corpus, params.meteor, params.spice)
    subsets = group_subsets({record.image_id: record.subset for record in data.records})
    summary = summarize_scores(metrics, subsets, params.resampling)
    summary = {"num_skipped_images": data.num_skipped_images, **summary}
    if data.trained_captions is not None:
        trained_corpus = _build_corpus(data, data.trained_captions, params.tokenizer)
        trained_metrics = compute_metrics(trained_corpus, with_meteor=False, with_spice=False)
        summary["refinement"] = _refinement(trained_metrics, metrics, params.resampling)
    summary["published"] = [to_plain(row) for row in params.published]
    write_json(folder / "scores.json", summary)
    rows = [{**row, "caption": data.generated[int(row["image_id"])].best.text} for row in per_image_scores(metrics)]
    write_atomically(folder / "images.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return Scores(corpus=corpus, metrics=metrics, summary=summary)


def analyze(
    data: EvaluationData, corpus: Corpus, params: EvaluateParams, folder: Path, device: torch.device, batch_size: int
) -> Analysis:
    """Compute statistics of the captions and the decoder, beyond scores.

    Writes `captions.json` (diversity, word usage and human agreement), `teacher_forcing.json` and `scenes.json`.

    Args:
        data: Artifacts of the split.
        corpus: Tokenized captions and references, from `score`.
        params: Settings of the evaluation.
        folder: Output folder.
        device: Device of the decoder.
        batch_size: Images per batch of the decoder.
    """
    captions = {
        "diversity": _diversity(data),
        "word_usage": _word_usage(data),
        "human_agreement": human_agreement(corpus, params.meteor and params.human_meteor, params.resampling),
    }
    write_json(folder / "captions.json", captions)
    batches = CaptionBatches(data.tokens, data.store, batch_size, device=device)
    data.model.decoder.to(device)
    teacher_forcing = _teacher_forcing(data.model, batches)
    write_json(folder / "teacher_forcing.json", teacher_forcing)
    scenes = score_scenes(data.records, data.generated, params.resampling, data.visible_objects, data.trained_captions)
    write_json(folder / "scenes.json", scenes)
    return Analysis(captions=captions, teacher_forcing=teacher_forcing, scenes=scenes)


def _refinement(trained: MetricTables, refined: MetricTables, resampling: Resampling) -> dict[str, dict[str, Any]]:
    """Compare the scores before and after refinement; METEOR and SPICE, which are slow, are left out."""
    return {
        metric: {"trained": values.pop("a"), "refined": values.pop("b"), **values}
        for metric, values in paired_differences(trained, refined, resampling).items()
    }


def _build_corpus(data: EvaluationData, captions: Mapping[int, Words], tokenizer: TokenizerName) -> Corpus:
    if tokenizer == "ptb":
        untokenized_references = {record.image_id: record.captions for record in data.records}
        language = data.model.vocabulary.language
        hypotheses = {image_id: join_words(words, language) for image_id, words in captions.items()}
        return build_corpora("ptb", language, untokenized_references, [hypotheses])[0]
    # Captions are generated in the words of tokens.h5, so hypotheses and references are already tokenized.
    tokenized_references = group_references(data.tokens)
    image_ids = tuple(sorted(captions))
    return Corpus(
        image_ids=image_ids,
        hypotheses=tuple(captions[image_id] for image_id in image_ids),
        references=tuple(tokenized_references[image_id] for image_id in image_ids),
        tokenization=read_tokenization(data.inputs.tokens / TOKENS_FILE),
    )


def _diversity(data: EvaluationData) -> dict[str, Any]:
    vocabulary = set(data.model.vocabulary.words[len(SPECIALS) :])
    captions: dict[str, Sequence[Words]] = {"generated": [caption.words for caption in data.generated.values()]}
    if data.trained_captions is not None:
        captions["trained"] = list(data.trained_captions.values())
    captions["reference"] = [captions[0] for captions in group_references(data.tokens).values()]
    return {
        **{name: diversity(texts, vocabulary, data.train_captions) for name, texts in captions.items()},
        "protocol": list(DIVERSITY_PROTOCOL),
    }


def _word_usage(data: EvaluationData) -> dict[str, Any]:
    """Return metrics, as numbers, and tables, as lists, which `dvc metrics show` leaves out."""
    references = group_references(data.tokens)
    captions = {image_id: caption.words for image_id, caption in data.generated.items()}
    generated, human = word_usage(captions, references), human_word_usage(references)
    tables = {
        "overused_words": generated.overused_words[:MAX_ROWS],
        "underused_words": generated.underused_words[:MAX_ROWS],
        "overused_phrases": generated.overused_phrases[:MAX_ROWS],
        "repeated_words": generated.repeated_words[:MAX_ROWS],
        "number_words": generated.number_words,
    }
    words = {usage.phrase[0] for usages in tables.values() for usage in usages if len(usage.phrase) == 1}
    all_captions = [*captions.values(), *(caption for captions in references.values() for caption in captions)]
    try:
        kinds = word_kinds(words, all_captions)
        protocol = f"kind: most frequent part of speech in captions and references, by spaCy's {TAGGER}"
    except UnavailableError as error:
        kinds, protocol = {}, f"kind: unavailable: {error}"
    return {
        "generated": generated.metrics,
        "reference": human.metrics,
        **{name: [_usage_row(usage, kinds) for usage in usages] for name, usages in tables.items()},
        "protocol": [*WORD_USAGE_PROTOCOL, f"tables: at most {MAX_ROWS} rows", protocol],
    }


def _usage_row(usage: Usage, kinds: Mapping[str, str]) -> dict[str, Any]:
    return {
        "phrase": " ".join(usage.phrase),
        "kind": kinds.get(usage.phrase[0]) if len(usage.phrase) == 1 else None,
        "said": usage.said,
        "right": usage.right,
        "in_references": usage.in_references,
        "image_id": usage.image_id,
    }


def _teacher_forcing(model: TrainedModel, batches: CaptionBatches) -> dict[str, Any]:
    result = evaluate_split(model.decoder, batches)
    if not result.loss <= _MAX_LOSS:
        raise UserError(
            f"evaluate: the loss under teacher forcing is {result.loss:.3g} nats per word. Check the feature store with"
            " `gridcap inspect --verify`, or train again."
        )
    scores = token_accuracy.token_scores(result.predicted, result.target)
    values = {
        "loss": result.loss,
        # Larger than any float for the loss of a diverged model.
        "perplexity": math.exp(result.loss) if result.loss < math.log(sys.float_info.max) else None,
        "accuracy": scores.accuracy,
        "macro_f1": scores.macro_f1,
        "weighted_f1": scores.weighted_f1,
    }
    return {
        "num_tokens": len(result.target),
        **{name: None if value is None else round(value, 6) for name, value in values.items()},
        "protocol": [
            *(f"{key}: {value}" for key, value in token_accuracy.PROTOCOL.items()),
            "loss: mean cross-entropy in nats per token; <end> is a token, rare words are <unk>",
        ],
    }
