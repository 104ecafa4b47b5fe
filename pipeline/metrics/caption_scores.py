"""All scores of captions against references, with their intervals and protocols.

`measure` looks at each image once; scores of all images, of a subset or of resamples are then made of sums over images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics import bleu, cider, meteor, rouge, spice
from pipeline.metrics.bootstrap import Resampling, Score, Table, mean, score_interval, score_table
from pipeline.metrics.corpus import Corpus
from pipeline.metrics.java import UnavailableError


def _bleu(order: int) -> Score:
    return lambda sums: bleu.bleu(sums)[..., order - 1]


CORPUS_SCORES: dict[str, Score] = {
    **{f"BLEU-{order}": _bleu(order) for order in range(1, bleu.ORDERS + 1)},
    "METEOR": meteor.meteor,
    "ROUGE-L": mean,
    "CIDEr-D": mean,
    "CIDEr": mean,
    "SPICE": mean,
}
"""The scores, in the order in which they are shown, from sums of their tables."""

SUBSET_SCORES = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "CIDEr", "SPICE")
"""Those that are told of subsets too."""


@dataclass(frozen=True, kw_only=True)
class MetricTables:
    """What is counted of one system's captions of N images."""

    image_ids: tuple[int, ...]
    tables: Mapping[str, Table]
    """By the name of a score, [N, D]: what `OF_SUMS` takes summed up over images."""
    images: Mapping[str, NDArray[np.float64]]
    """By the name of a score, [N]: that of each image, for scores that mean something for one."""
    protocol: Mapping[str, tuple[str, ...]]
    """By the name of a score, what it says of itself."""
    unavailable: Mapping[str, str]
    """By the name of a score, why it was not computed."""

    def score(self, name: str) -> float:
        """The score of all images."""
        return float(CORPUS_SCORES[name](self.tables[name].sum(axis=0)))


def measure(corpus: Corpus, with_meteor: bool, with_spice: bool) -> MetricTables:
    """Measure captions by all scores; those that this machine cannot compute come out as unavailable.

    Raises `ValueError` where there are no images, or one has no reference.
    """
    hypotheses, references = corpus.hypotheses, corpus.references
    tables: dict[str, Table] = {}
    images: dict[str, NDArray[np.float64]] = {}
    protocols: dict[str, Mapping[str, object]] = {}
    asked = {"METEOR": with_meteor, "SPICE": with_spice}
    unavailable = {name: "not asked for" for name, wanted in asked.items() if not wanted}

    counts = bleu.bleu_counts(hypotheses, references)
    for order in range(1, bleu.ORDERS + 1):
        tables[f"BLEU-{order}"], protocols[f"BLEU-{order}"] = counts, bleu.PROTOCOL
    if with_meteor:
        try:
            tables["METEOR"] = meteor.meteor_counts(hypotheses, references)
            images["METEOR"] = meteor.meteor(tables["METEOR"])
        except UnavailableError as error:
            unavailable["METEOR"] = str(error)
    images["ROUGE-L"] = rouge.rouge_l(hypotheses, references)
    ciders = cider.cider(hypotheses, references)
    images["CIDEr-D"], images["CIDEr"] = ciders.cider_d, ciders.cider
    if with_spice:
        try:
            images["SPICE"] = spice.spice(hypotheses, references)
        except UnavailableError as error:
            unavailable["SPICE"] = str(error)

    protocols |= {"METEOR": meteor.PROTOCOL, "ROUGE-L": rouge.PROTOCOL, "SPICE": spice.PROTOCOL}
    protocols |= {"CIDEr-D": cider.PROTOCOL, "CIDEr": cider.PROTOCOL}
    tables |= {name: score_table(scores) for name, scores in images.items() if name not in tables}
    return MetricTables(
        image_ids=corpus.image_ids,
        tables={name: tables[name] for name in CORPUS_SCORES if name in tables},
        images=images,
        protocol={
            name: (*(f"{key}: {said}" for key, said in protocols[name].items()), *corpus.protocol)
            for name in CORPUS_SCORES
            if name in tables
        },
        unavailable=unavailable,
    )


def summary(measured: MetricTables, subsets: Mapping[str, Sequence[int]], resampling: Resampling) -> dict[str, Any]:
    """The scores of all images and of each subset of them, as plain values to write down.

    Numbers to look at stand by themselves, `{"BLEU-4": 0.31, "subsets": {"seen": {"BLEU-4": 0.33}}}`; intervals and
    protocols, lists, beside them under the same names. CIDEr's document frequencies are those of all images in subsets
    too.
    """
    rows = {image_id: row for row, image_id in enumerate(measured.image_ids)}
    chosen = {subset: np.array([rows[image_id] for image_id in members]) for subset, members in subsets.items()}
    values, intervals = _intervals(measured, np.arange(len(rows)), tuple(CORPUS_SCORES), resampling)
    parts = {subset: _intervals(measured, members, SUBSET_SCORES, resampling) for subset, members in chosen.items()}
    if parts:
        values["subsets"] = {subset: part[0] for subset, part in parts.items()}
        intervals["subsets"] = {subset: part[1] for subset, part in parts.items()}
    return {
        **values,
        "intervals": intervals,
        **statements(measured, resampling),
    }


def statements(measured: MetricTables, resampling: Resampling) -> dict[str, dict[str, list[str]]]:
    """What stands beside scores: the protocol of each and of intervals, and why some are absent."""
    protocol = {name: list(lines) for name, lines in measured.protocol.items()}
    return {
        "protocol": {**protocol, "intervals": [resampling.protocol]},
        "unavailable": {name: [reason] for name, reason in measured.unavailable.items()},
    }


def _intervals(
    measured: MetricTables, rows: NDArray[np.intp], names: Sequence[str], resampling: Resampling
) -> tuple[dict[str, Any], dict[str, Any]]:
    found = {
        name: score_interval(measured.tables[name][rows], CORPUS_SCORES[name], resampling)
        for name in names
        if name in measured.tables
    }
    values = {"images": len(rows), **{name: round(interval.value, 6) for name, interval in found.items()}}
    return values, {name: [round(one.low, 6), round(one.high, 6)] for name, one in found.items()}


def image_rows(measured: MetricTables) -> list[dict[str, float | int]]:
    """For each image its id and its own scores, as plain values to write down."""
    return [
        {"image_id": image_id, **{name: round(float(scores[row]), 6) for name, scores in measured.images.items()}}
        for row, image_id in enumerate(measured.image_ids)
    ]
