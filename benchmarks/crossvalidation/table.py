"""The tables: scores of every row, its paired difference to the baselines, and its use of words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.metrics.bootstrap import Interval, Resampling, Table, paired_difference, score_interval
from pipeline.metrics.caption_scores import CORPUS_SCORES, compute_metrics
from pipeline.metrics.corpus import Corpus, Words
from pipeline.metrics.diversity import diversity
from pipeline.metrics.tokenizers import SPACY
from pipeline.metrics.word_usage import word_usage

SCORES = ("BLEU-4", "CIDEr-D", "CIDEr")
BASELINES = ("soft_attention", "textbook", "retrieval")
"""Systems that all others are compared with."""
RESAMPLING = Resampling(bootstrap_samples=1000, seed=0)
_USAGE = {
    "precision": ".3f",
    "recall": ".3f",
    "num_overused_words": ".0f",
    "num_underused_words": ".0f",
    "num_overused_phrases": ".0f",
    "repeated_word_rate": ".3f",
    "bad_endings": ".3f",
    "vocab_size": ".0f",
}
"""Format of each metric of `SystemScores.usage`."""
_RULE = "| --- " * 8 + "|"
SCORE_HEAD = (f"| system | seed | search | {' | '.join(SCORES)} | distinct captions | words |", _RULE)
DIFFERENCE_HEAD = (f"| system | seed | search | minus | {' | '.join(SCORES)} | CIDEr-D gain |", _RULE)
USAGE_HEAD = (f"| system | seed | search | {' | '.join(_USAGE)} | most overused |", "| --- " * (len(_USAGE) + 4) + "|")
_NUM_WORDS = 3
"""Number of words in the last column of `USAGE_HEAD`."""


class Row(NamedTuple):
    """Names a row of the table."""

    system: str
    seeds: str
    search: str


@dataclass(frozen=True, kw_only=True)
class SystemScores:
    """Scores of one system's captions."""

    tables: Mapping[str, Table]
    """For each of `SCORES` the per-image counts that it is computed from, by ascending image id."""
    num_distinct: int
    """Distinct captions."""
    mean_length: float
    """Words per caption."""
    usage: Mapping[str, float]
    """Metrics of `results/metrics/captions.json`, sections `word_usage` and `diversity`, by name."""
    overused: Sequence[str]
    """The words of the largest excess, with the captions that have them and those of them that are right."""


def score(captions: Mapping[int, Words], references: Mapping[int, Sequence[Words]]) -> SystemScores:
    """Score a caption of each image against its references."""
    image_ids = tuple(sorted(captions))
    corpus = Corpus(
        image_ids=image_ids,
        hypotheses=tuple(captions[image_id] for image_id in image_ids),
        references=tuple(references[image_id] for image_id in image_ids),
        tokenization=SPACY,
    )
    usage = word_usage(captions, {image_id: references[image_id] for image_id in image_ids})
    metrics = usage.metrics | diversity(corpus.hypotheses, vocabulary=frozenset(), train_captions=frozenset())
    return SystemScores(
        tables=compute_metrics(corpus, with_meteor=False, with_spice=False).tables,
        num_distinct=len({tuple(words) for words in corpus.hypotheses}),
        mean_length=float(np.mean([len(words) for words in corpus.hypotheses])),
        usage={name: float("nan") if (value := metrics[name]) is None else float(value) for name in _USAGE},
        overused=[f"{word.phrase[0]} {word.said} ({word.right})" for word in usage.overused_words],
    )


def mean_scores(scores: Sequence[SystemScores]) -> SystemScores:
    """Return the mean of several seeds' counts, whose scores are those of a typical seed without its luck."""
    return SystemScores(
        tables={metric: np.mean([seed.tables[metric] for seed in scores], axis=0) for metric in SCORES},
        num_distinct=round(np.mean([seed.num_distinct for seed in scores])),
        mean_length=float(np.mean([seed.mean_length for seed in scores])),
        usage={name: float(np.mean([seed.usage[name] for seed in scores])) for name in _USAGE},
        overused=[],
    )


def add_means(scores: Mapping[Row, SystemScores]) -> dict[Row, SystemScores]:
    """Add the mean of the seeds of each system that has several, after the last of them."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in scores:
        if row.seeds.isdigit():
            groups.setdefault((row.system, row.search), []).append(row)
    result: dict[Row, SystemScores] = {}
    for row, row_scores in scores.items():
        result[row] = row_scores
        group = groups.get((row.system, row.search), [])
        if len(group) > 1 and row == group[-1]:
            result[row._replace(seeds="mean")] = mean_scores([scores[seed] for seed in group])
    return result


def baseline_row(row: Row, system: str, rows: Sequence[Row]) -> Row | None:
    """Return the row of a baseline that a row is compared with; None if there is none or it is the row itself.

    It has the same search and the same seeds or, for a mean or an ensemble, the mean. Otherwise the first row is taken.
    """
    candidates = [other for other in rows if other.system == system and other.search in (row.search, "")]
    seeds = row.seeds if row.seeds.isdigit() else "mean"
    match = next((other for other in candidates if other.seeds == seeds), candidates[0] if candidates else None)
    return None if match == row else match


def score_lines(scores: Mapping[Row, SystemScores]) -> list[str]:
    """Format a line of a Markdown table for each row."""
    return [
        _line(
            *row,
            *(
                _format_interval(score_interval(system.tables[metric], CORPUS_SCORES[metric], RESAMPLING), "")
                for metric in SCORES
            ),
            str(system.num_distinct),
            f"{system.mean_length:.1f}",
        )
        for row, system in scores.items()
    ]


def difference_lines(scores: Mapping[Row, SystemScores], baselines: Sequence[str] = BASELINES) -> list[str]:
    """Format a line of a Markdown table for the paired difference of each row and each baseline."""
    lines = []
    for row, system in scores.items():
        for name in baselines:
            baseline = baseline_row(row, name, list(scores))
            if baseline is None or row.system in baselines[1:]:
                continue
            intervals = {
                metric: paired_difference(
                    system.tables[metric], scores[baseline].tables[metric], CORPUS_SCORES[metric], RESAMPLING
                )
                for metric in SCORES
            }
            baseline_cider = float(CORPUS_SCORES["CIDEr-D"](scores[baseline].tables["CIDEr-D"].sum(axis=0)))
            gain = intervals["CIDEr-D"].value / baseline_cider if baseline_cider else float("nan")
            cells = (_format_interval(interval, "+") for interval in intervals.values())
            lines.append(_line(*row, f"{name} {baseline.seeds}".strip(), *cells, f"{gain:+.1%}"))
    return lines


def usage_lines(scores: Mapping[Row, SystemScores]) -> list[str]:
    """Format a line of a Markdown table for the words of each row."""
    return [
        _line(
            *row,
            *(format(system.usage[name], spec) for name, spec in _USAGE.items()),
            ", ".join(system.overused[:_NUM_WORDS]),
        )
        for row, system in scores.items()
    ]


def _format_interval(interval: Interval, sign: str) -> str:
    value, low, high = (format(score, f"{sign}.3f") for score in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
