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

RESAMPLES, SEED = 1000, 0
PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number measured on all images, and where it lies in 95% of the resamples."""

    value: float
    low: float
    high: float


def score_interval(images: Table, score: Score, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """The score of one system, and its interval."""
    return _interval(score(images.sum(axis=0)), score(_resampled(images, resamples, seed)))


def paired_difference(
    images: Table, others: Table, score: Score, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """The score of one system less that of another on the same images, row by row, and its interval."""
    if len(images) != len(others):
        raise ValueError(f"systems are compared on the same images, got {len(images)} and {len(others)}")
    return _interval(
        score(images.sum(axis=0)) - score(others.sum(axis=0)),
        score(_resampled(images, resamples, seed)) - score(_resampled(others, resamples, seed)),
    )


def _resampled(images: Table, resamples: int, seed: int) -> Table:
    """Sums over each resample [resamples, D]: the same number of images and seed give the same resamples."""
    count = len(images)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    sums: Table = drawn @ images
    return sums


def _interval(value: npt.NDArray[np.float64], found: npt.NDArray[np.float64]) -> Interval:
    low, high = np.percentile(found, PERCENTILES)
    return Interval(value=float(value), low=float(low), high=float(high))
