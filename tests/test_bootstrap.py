"""Intervals of scores and of their differences, against what is known of means."""

import numpy as np
import pytest

from pipeline.metrics.bootstrap import Interval, Resampling, mean, paired_difference, score_interval, score_table

RESAMPLING = Resampling(bootstrap_samples=1000, seed=0)


def test_the_interval_of_a_mean_is_that_of_the_standard_error() -> None:
    scores = np.random.default_rng(1).normal(0.5, 2.0, size=400)
    found = score_interval(score_table(scores), mean, Resampling(bootstrap_samples=4000, seed=0))
    margin = 1.96 * scores.std() / 20
    assert found.value == pytest.approx(scores.mean())
    assert [found.low, found.high] == pytest.approx([found.value - margin, found.value + margin], abs=0.05 * margin)


def test_a_difference_is_paired_image_by_image() -> None:
    scores = np.random.default_rng(2).normal(0.0, 1.0, size=300)
    shifted = paired_difference(score_table(scores + 0.01), score_table(scores), mean, RESAMPLING)
    assert [shifted.value, shifted.low, shifted.high] == pytest.approx([0.01] * 3)
    itself = paired_difference(score_table(scores), score_table(scores), mean, RESAMPLING)
    assert itself == Interval(value=0.0, low=0.0, high=0.0)


def test_equal_systems_differ_by_about_nothing_and_unlike_ones_clearly() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.normal(0.2, 0.3, size=(2, 500))
    equal = paired_difference(score_table(first), score_table(second), mean, RESAMPLING)
    assert equal.low < 0 < equal.high
    better = paired_difference(score_table(first + 0.2), score_table(second), mean, RESAMPLING)
    assert better.low > 0
    assert better.value == pytest.approx(equal.value + 0.2)
    with pytest.raises(ValueError, match="same images, got 500 and 499"):
        paired_difference(score_table(first), score_table(second[1:]), mean, RESAMPLING)
