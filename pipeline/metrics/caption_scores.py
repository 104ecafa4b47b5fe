"""All metrics of a corpus, with intervals, protocols and signatures.

`compute_metrics` processes each image once. The scores of all images, of a subset and of a bootstrap sample are then
computed from sums over images.

Legend: `N` images, `D` columns of a metric's table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics import bleu, cider, meteor, rouge, spice
from pipeline.metrics.bootstrap import (
    Resampling,
    ScoreFunction,
    Table,
    mean,
    paired_difference,
    score_interval,
    score_table,
)
from pipeline.metrics.corpus import Corpus
from pipeline.metrics.java import UnavailableError, require_english

_BLEU_NAMES = [f"BLEU-{order}" for order in range(1, bleu.MAX_ORDER + 1)]


@dataclass(frozen=True, kw_only=True)
class _Metric:
    score: ScoreFunction
    protocol: Mapping[str, object]
    signature: Mapping[str, str]


def _bleu(order: int) -> _Metric:
    return _Metric(score=lambda sums: bleu.bleu(sums)[..., order - 1], protocol=bleu.PROTOCOL, signature=bleu.SIGNATURE)


_METRICS = {
    **{name: _bleu(order) for order, name in enumerate(_BLEU_NAMES, start=1)},
    "METEOR": _Metric(score=meteor.meteor, protocol=meteor.PROTOCOL, signature=meteor.SIGNATURE),
    "ROUGE-L": _Metric(score=mean, protocol=rouge.PROTOCOL, signature=rouge.SIGNATURE),
    "CIDEr-D": _Metric(score=mean, protocol=cider.PROTOCOL, signature=cider.SIGNATURE_D),
    "CIDEr": _Metric(score=mean, protocol=cider.PROTOCOL, signature=cider.SIGNATURE),
    "SPICE": _Metric(score=mean, protocol=spice.PROTOCOL, signature=spice.SIGNATURE),
}

CORPUS_SCORES: dict[str, ScoreFunction] = {name: metric.score for name, metric in _METRICS.items()}
"""Function from the summed table of a corpus to its score, by metric in display order."""

SUBSET_SCORES = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "CIDEr", "SPICE")
"""Metrics that are also reported for subsets."""


@dataclass(frozen=True, kw_only=True)
class MetricTables:
    """The counts of all metrics for the captions of one system. All mappings are by metric."""

    image_ids: tuple[int, ...]
    """N image ids, in the order of all rows."""
    tables: Mapping[str, Table]
    """Counts [N, D], summed over images for `CORPUS_SCORES`."""
    image_scores: Mapping[str, NDArray[np.float64]]
    """Scores of single images [N], of metrics that are defined for one image."""
    protocol: Mapping[str, tuple[str, ...]]
    """How the score was computed, as lines `key: value`."""
    signature: Mapping[str, str]
    """The protocol in one line, to quote with the score."""
    unavailable: Mapping[str, str]
    """Reason why a metric was not computed; see `cider.is_defined`."""

    def score(self, metric: str) -> float:
        """Compute the score of all images."""
        return float(CORPUS_SCORES[metric](self.tables[metric].sum(axis=0)))


def compute_metrics(
    corpus: Corpus, with_meteor: bool, with_spice: bool, cider_scores: cider.CiderScores | None = None
) -> MetricTables:
    """Compute the tables of all metrics. Metrics that this machine or language does not have are listed as unavailable.

    Args:
        corpus: Hypotheses and references.
        with_meteor: Compute METEOR, which needs Java.
        with_spice: Compute SPICE, which needs Java 8 to 14 and Stanford CoreNLP.
        cider_scores: CIDEr-D and CIDEr of the corpus, if they have been computed.

    Raises:
        ValueError: There are no images, or one has no reference.
    """
    hypotheses, references = corpus.hypotheses, corpus.references
    enabled = {"METEOR": with_meteor, "SPICE": with_spice}
    unavailable = {metric: "disabled" for metric, is_enabled in enabled.items() if not is_enabled}
    tables: dict[str, Table] = {}
    image_scores: dict[str, NDArray[np.float64]] = {}

    tables |= dict.fromkeys(_BLEU_NAMES, bleu.bleu_counts(hypotheses, references))
    if with_meteor:
        try:
            require_english("METEOR", corpus.tokenization.language)
            tables["METEOR"] = meteor.meteor_counts(hypotheses, references)
            image_scores["METEOR"] = meteor.meteor(tables["METEOR"])
        except UnavailableError as error:
            unavailable["METEOR"] = str(error)
    image_scores["ROUGE-L"] = rouge.rouge_l(hypotheses, references)
    if cider.is_defined(references):
        cider_scores = cider_scores or cider.cider(hypotheses, references)
        image_scores["CIDEr-D"], image_scores["CIDEr"] = cider_scores.cider_d, cider_scores.cider
    else:
        images = "one image" if len(references) == 1 else "images with the same n-grams in their references"
        unavailable |= dict.fromkeys(("CIDEr-D", "CIDEr"), f"not defined for {images}")
    if with_spice:
        try:
            require_english("SPICE", corpus.tokenization.language)
            image_scores["SPICE"] = spice.spice(hypotheses, references)
        except UnavailableError as error:
            unavailable["SPICE"] = str(error)

    tables |= {metric: score_table(scores) for metric, scores in image_scores.items() if metric not in tables}
    metrics = [metric for metric in CORPUS_SCORES if metric in tables]
    return MetricTables(
        image_ids=corpus.image_ids,
        tables={metric: tables[metric] for metric in metrics},
        image_scores=image_scores,
        protocol={metric: _protocol(metric, corpus) for metric in metrics},
        signature={metric: _signature(metric, corpus) for metric in metrics},
        unavailable=unavailable,
    )


def _protocol(metric: str, corpus: Corpus) -> tuple[str, ...]:
    return (*(f"{key}: {value}" for key, value in _METRICS[metric].protocol.items()), *corpus.protocol)


def _signature(metric: str, corpus: Corpus) -> str:
    fields = {**corpus.signature, **_METRICS[metric].signature}
    return "|".join([metric, *(f"{key}:{value}" for key, value in fields.items())])


def group_subsets(subset_by_image: Mapping[int, str | None]) -> dict[str, list[int]]:
    """Return the image ids of each subset, from the subset of each image; None for an image in no subset."""
    subsets: dict[str, list[int]] = {}
    for image_id, subset in subset_by_image.items():
        if subset is not None:
            subsets.setdefault(subset, []).append(image_id)
    return subsets


def summarize_scores(
    metrics: MetricTables, subsets: Mapping[str, Sequence[int]], resampling: Resampling
) -> dict[str, Any]:
    """Summarize the scores of all images and of each subset, as JSON values.

    Scores are numbers, `{"BLEU-4": 0.31, "subsets": {"seen": {"BLEU-4": 0.33}}}`. Intervals, protocols and signatures
    are lists under the same names, which `dvc metrics show` leaves out. In subsets too, CIDEr's document frequencies
    are those of all images.

    Args:
        metrics: Tables of all images.
        subsets: Image ids of each subset, by name.
        resampling: Bootstrap settings of the intervals.
    """
    rows = {image_id: row for row, image_id in enumerate(metrics.image_ids)}
    scores, intervals = _scores_and_intervals(metrics, np.arange(len(rows)), tuple(CORPUS_SCORES), resampling)
    subset_summaries = {
        subset: _scores_and_intervals(
            metrics, np.array([rows[image_id] for image_id in image_ids]), SUBSET_SCORES, resampling
        )
        for subset, image_ids in subsets.items()
    }
    if subset_summaries:
        scores["subsets"] = {subset: subset_scores for subset, (subset_scores, _) in subset_summaries.items()}
        intervals["subsets"] = {subset: subset_intervals for subset, (_, subset_intervals) in subset_summaries.items()}
    return {**scores, "intervals": intervals, **provenance(metrics, resampling)}


def paired_differences(
    metrics_a: MetricTables, metrics_b: MetricTables, resampling: Resampling
) -> dict[str, dict[str, Any]]:
    """Compute the scores of two systems on the same images, and their differences, as JSON values.

    Args:
        metrics_a: Tables of system `a`.
        metrics_b: Tables of system `b`.
        resampling: Bootstrap settings.

    Returns:
        For each metric that both have: `a`, `b`, `difference` (b - a), its 95% `interval` (None for one image), and
        whether it is `significant`.
    """
    differences = {}
    for metric in [metric for metric in metrics_a.tables if metric in metrics_b.tables]:
        interval = paired_difference(
            metrics_b.tables[metric], metrics_a.tables[metric], CORPUS_SCORES[metric], resampling
        )
        differences[metric] = {
            "a": round(metrics_a.score(metric), 6),
            "b": round(metrics_b.score(metric), 6),
            **interval.describe_difference(),
        }
    return differences


def provenance(metrics: MetricTables, resampling: Resampling) -> dict[str, dict[str, list[str]]]:
    """Return protocol and signature of each score, and the reason why a metric is unavailable, as JSON values."""
    protocol = {metric: list(lines) for metric, lines in metrics.protocol.items()}
    return {
        "protocol": {
            **protocol,
            "intervals": [
                resampling.protocol if len(metrics.image_ids) > 1 else "intervals: not defined for one image"
            ],
        },
        "signature": {metric: [signature] for metric, signature in metrics.signature.items()},
        "unavailable": {metric: [reason] for metric, reason in metrics.unavailable.items()},
    }


def _scores_and_intervals(
    metrics: MetricTables, rows: NDArray[np.intp], names: Sequence[str], resampling: Resampling
) -> tuple[dict[str, Any], dict[str, Any]]:
    intervals = {
        name: score_interval(metrics.tables[name][rows], CORPUS_SCORES[name], resampling).rounded()
        for name in names
        if name in metrics.tables
    }
    scores = {"num_images": len(rows), **{name: value for name, (value, *_) in intervals.items()}}
    return scores, {name: ends for name, (_, *ends) in intervals.items() if ends}


def per_image_scores(metrics: MetricTables) -> list[dict[str, float | int]]:
    """Return the id and the scores of each image, as JSON values."""
    return [
        {"image_id": image_id, **{name: round(float(scores[row]), 6) for name, scores in metrics.image_scores.items()}}
        for row, image_id in enumerate(metrics.image_ids)
    ]
