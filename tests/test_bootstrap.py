"""Bootstrap intervals, compared with the analytic intervals of means."""

import numpy as np
import pytest

from pipeline.metrics.bootstrap import Interval, Resampling, mean, paired_difference, score_interval, score_table

RESAMPLING = Resampling(bootstrap_samples=1000, seed=0)


def test_the_interval_of_a_mean_follows_its_standard_error() -> None:
    scores = np.random.default_rng(1).normal(0.5, 2.0, size=400)
    interval = score_interval(score_table(scores), mean, Resampling(bootstrap_samples=4000, seed=0))
    margin = 1.96 * scores.std() / 20
    assert interval.value == pytest.approx(scores.mean())
    assert [interval.low, interval.high] == pytest.approx(
        [interval.value - margin, interval.value + margin], abs=0.05 * margin
    )


def test_a_difference_is_paired_by_image() -> None:
    scores = np.random.default_rng(2).normal(0.0, 1.0, size=300)
    shifted = paired_difference(score_table(scores + 0.01), score_table(scores), mean, RESAMPLING)
    assert [shifted.value, shifted.low, shifted.high] == pytest.approx([0.01] * 3)
    same = paired_difference(score_table(scores), score_table(scores), mean, RESAMPLING)
    assert same == Interval(value=0.0, low=0.0, high=0.0)
    assert same.includes_zero


def test_only_the_difference_of_unequal_systems_excludes_zero() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.normal(0.2, 0.3, size=(2, 500))
    equal = paired_difference(score_table(first), score_table(second), mean, RESAMPLING)
    assert equal.low < 0 < equal.high
    better = paired_difference(score_table(first + 0.2), score_table(second), mean, RESAMPLING)
    assert not better.includes_zero
    assert better.value == pytest.approx(equal.value + 0.2)


def test_systems_of_different_images_are_rejected() -> None:
    with pytest.raises(ValueError, match="same images, got 3 and 2"):
        paired_difference(score_table(np.ones(3)), score_table(np.ones(2)), mean, RESAMPLING)


def test_one_image_has_no_interval() -> None:
    one = score_table(np.array([0.25]))
    assert score_interval(one, mean, RESAMPLING).rounded() == [0.25]
    difference = paired_difference(one, score_table(np.zeros(1)), mean, RESAMPLING)
    assert difference.rounded() == [0.25]
    assert difference.includes_zero


def test_the_protocol_gives_samples_and_seed() -> None:
    assert "300 samples, seed 5" in Resampling(bootstrap_samples=300, seed=5).protocol


def test_json_values_are_rounded() -> None:
    assert Interval(value=0.12345678, low=0.1, high=0.2).rounded() == [0.123457, 0.1, 0.2]
