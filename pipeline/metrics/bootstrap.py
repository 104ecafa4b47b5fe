"""How far scores of systems on the same images, and their differences, are to be trusted.

A corpus score is a function of sums over images, so a resample of the images is scored from its own sums: of n-gram
counts for BLEU, of the images' scores for CIDEr, whose document frequencies stay those of all images. The difference of
two systems is taken on the same resamples (paired bootstrap: Koehn 2004, Statistical Significance Tests for Machine
Translation Evaluation). It tells what other images could have changed, not what another seed of training would have.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[Any]
"""[N, D]: D numbers an image that are summed up over the images."""
Score = Callable[[Table], npt.NDArray[np.float64]]
"""The scores [...] of corpora from their sums [..., D]."""

PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """The resamples of images that intervals are made of: the same ones for the same number of images."""

    bootstrap_samples: int
    seed: int

    @property
    def protocol(self) -> str:
        """What an interval says of itself."""
        return (
            f"intervals: 95%, bootstrap over images, percentiles of {self.bootstrap_samples} resamples, seed {self.seed}; "
            "document frequencies stay those of all images"
        )


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number measured on all images, and where it lies in 95% of the resamples."""

    value: float
    low: float
    high: float

    @property
    def includes_zero(self) -> bool:
        """Whether a difference of this kind may be noise."""
        return self.low <= 0 <= self.high


def mean(sums: Table) -> npt.NDArray[np.float64]:
    """The mean [...] of scores from the sums [..., 2] of what `of_scores` makes of them."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def score_table(scores: npt.NDArray[np.float64]) -> Table:
    """The table [N, 2] that `mean` takes: each image's score [N], and a 1 to count it."""
    return np.stack([scores, np.ones(len(scores))], axis=1)


def score_interval(images: Table, score: Score, resampling: Resampling) -> Interval:
    """The score of one system, and its interval."""
    return _interval(score(images.sum(axis=0)), score(_resampled(images, resampling)))


def paired_difference(images: Table, others: Table, score: Score, resampling: Resampling) -> Interval:
    """The score of one system less that of another on the same images, row by row, and its interval.

    Raises `ValueError` where the tables have unlike numbers of images.
    """
    if len(images) != len(others):
        raise ValueError(f"systems are compared on the same images, got {len(images)} and {len(others)}")
    return _interval(
        score(images.sum(axis=0)) - score(others.sum(axis=0)),
        score(_resampled(images, resampling)) - score(_resampled(others, resampling)),
    )


def _resampled(images: Table, resampling: Resampling) -> Table:
    """Sums over each resample: [resamples, D]."""
    count = len(images)
    generator = np.random.default_rng(resampling.seed)
    sums = np.empty((resampling.bootstrap_samples, images.shape[1]))
    table = images.astype(np.float64)  # exact for counts, and many times faster to multiply than integers
    for row in sums:
        row[:] = np.bincount(generator.integers(count, size=count), minlength=count) @ table
    return sums


def _interval(value: npt.NDArray[np.float64], found: npt.NDArray[np.float64]) -> Interval:
    low, high = np.percentile(found, PERCENTILES)
    return Interval(value=float(value), low=float(low), high=float(high))
