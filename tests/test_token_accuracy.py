import numpy as np
import pytest

from pipeline.metrics.token_accuracy import token_scores


@pytest.mark.parametrize(
    ("predicted", "target", "expected"),
    [
        pytest.param([1, 2, 3], [1, 2, 3], (1, 1, 1), id="all correct"),
        pytest.param([2, 1], [1, 2], (0, 0, 0), id="all wrong"),
        # F1 of class 0: correct 2, predicted 3, targets 3; class 1: correct 1, predicted 1, targets 2.
        pytest.param([0, 0, 1, 0, 7], [0, 0, 1, 1, 0], (3 / 5, 2 / 3, 2 / 3), id="class 7 only predicted"),
        pytest.param([0, 0, 0, 0], [0, 0, 0, 1], (3 / 4, (6 / 7) / 2, (6 / 7) * 3 / 4), id="rare class missed"),
    ],
)
def test_token_scores(predicted, target, expected):
    scores = token_scores(np.array(predicted), np.array(target))
    assert (scores.accuracy, scores.macro_f1, scores.weighted_f1) == pytest.approx(expected)


@pytest.mark.parametrize(("predicted", "target"), [([], []), ([1], [1, 2]), ([[1]], [[1]]), ([-1], [0])], ids=str)
def test_invalid_arrays_are_rejected(predicted, target):
    with pytest.raises(ValueError, match=r"1-D arrays|>= 0"):
        token_scores(np.array(predicted, dtype=np.int64), np.array(target, dtype=np.int64))
