"""Confidence intervals of scores, and of the difference between two systems on the same images.

A corpus score is a function of sums over images: of n-gram counts for BLEU, of the scores of single images for CIDEr.
So a bootstrap sample of the images is scored from its sums. CIDEr's document frequencies remain those of all images.
The difference of two systems is computed on the same samples (paired bootstrap: Koehn 2004, Statistical Significance
Tests for Machine Translation Evaluation). The intervals cover the choice of images, not the seed of training.

Legend: `N` images, `D` columns of a metric's table, `M` bootstrap samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[Any]
"""Counts of a metric for each image, [N, D]."""
ScoreFunction = Callable[[Table], npt.NDArray[np.float64]]
"""Function from summed counts [..., D] of corpora to their scores [...]."""

PERCENTILES = (2.5, 97.5)
"""Ends of a 95% interval."""


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """Bootstrap settings. The same settings draw the same samples for the same number of images."""

    bootstrap_samples: int
    """M, the number of samples."""
    seed: int
    """Seed of the random samples."""

    @property
    def protocol(self) -> str:
        """Protocol line of the intervals."""
        return (
            f"intervals: 95%, percentile bootstrap over images, {self.bootstrap_samples} samples, seed {self.seed}; "
            "document frequencies of all images"
        )


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A score, or a difference of scores, with its 95% interval."""

    value: float
    """Score on all images."""
    low: float
    """Lower end of the interval; NaN for one image, which has no interval."""
    high: float
    """Upper end of the interval; NaN for one image."""

    @property
    def includes_zero(self) -> bool:
        """Whether a difference with this interval is not significant."""
        return not (self.low > 0 or self.high < 0)

    def rounded(self) -> list[float]:
        """Return value, low and high, rounded to 6 digits for JSON; the value alone if there is no interval."""
        values = (self.value,) if math.isnan(self.low) else (self.value, self.low, self.high)
        return [round(value, 6) for value in values]

    def describe_difference(self) -> dict[str, Any]:
        """Return `difference`, its `interval` (None if there is none) and whether it is `significant`, for JSON."""
        difference, *ends = self.rounded()
        return {"difference": difference, "interval": ends or None, "significant": not self.includes_zero}


def score_table(scores: npt.NDArray[np.float64]) -> Table:
    """Build the table [N, 2] of a metric that averages the scores [N] of images: each score, and a 1."""
    return np.stack([scores, np.ones(len(scores))], axis=1)


def mean(sums: Table) -> npt.NDArray[np.float64]:
    """Compute the mean score [...] from the sums [..., 2] of a `score_table`."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def score_interval(table: Table, score: ScoreFunction, resampling: Resampling) -> Interval:
    """Compute the score of one system with its interval.

    Args:
        table: Counts of the system, [N, D].
        score: The metric.
        resampling: Bootstrap settings.
    """
    value = score(table.sum(axis=0))
    return _interval(value, score(_bootstrap_sums(table, resampling)) if len(table) > 1 else None)


def paired_difference(table: Table, baseline: Table, score: ScoreFunction, resampling: Resampling) -> Interval:
    """Compute the score of a system minus that of a baseline, with its interval.

    Args:
        table: Counts of the system, [N, D].
        baseline: Counts of the baseline for the same images in the same order, [N, D].
        score: The metric.
        resampling: Bootstrap settings.

    Raises:
        ValueError: The tables differ in their number of images.
    """
    if len(table) != len(baseline):
        raise ValueError(f"systems must be compared on the same images, got {len(table)} and {len(baseline)}")
    value = score(table.sum(axis=0)) - score(baseline.sum(axis=0))
    if len(table) == 1:
        return _interval(value, None)
    return _interval(value, score(_bootstrap_sums(table, resampling)) - score(_bootstrap_sums(baseline, resampling)))


def _bootstrap_sums(table: Table, resampling: Resampling) -> Table:
    """Sum the counts of each bootstrap sample: [M, D]."""
    num_images = len(table)
    generator = np.random.default_rng(resampling.seed)
    sums = np.empty((resampling.bootstrap_samples, table.shape[1]))
    counts = table.astype(np.float64)  # exact for counts; NumPy multiplies floats much faster than integers
    for row in sums:
        row[:] = np.bincount(generator.integers(num_images, size=num_images), minlength=num_images) @ counts
    return sums


def _interval(value: npt.NDArray[np.float64], samples: npt.NDArray[np.float64] | None) -> Interval:
    low, high = (math.nan, math.nan) if samples is None else np.percentile(samples, PERCENTILES)
    return Interval(value=float(value), low=float(low), high=float(high))
