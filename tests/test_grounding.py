import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.metrics.grounding import mass_by_chance, mass_in_boxes, peak_by_chance, peak_in_boxes

FULL_IMAGE = (0.0, 0.0, 1.0, 1.0)
# [2, 4]; the peak is in row 1, column 2, whose center is at x = 0.625, y = 0.75.
ATTENTION = np.array([[0.1, 0.1, 0.1, 0.0], [0.0, 0.2, 0.4, 0.1]])


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (FULL_IMAGE, True),
        ((0.5, 0.5, 0.25, 0.5), True),
        ((0.6, 0.7, 0.05, 0.1), True),
        ((0.0, 0.0, 1.0, 0.5), False),
        ((0.5, 0.5, 0.125, 0.5), False),
        ((0.625, 0.75, 0.1, 0.1), True),
        ((0.7, 0.5, 0.3, 0.5), False),
    ],
)
def test_peak_in_box(box, expected):
    assert peak_in_boxes(ATTENTION, [box]) is expected


def test_the_first_of_equal_peaks_counts():
    assert peak_in_boxes(np.ones((2, 2)), [(0.0, 0.0, 0.5, 0.5)])
    assert not peak_in_boxes(np.ones((2, 2)), [(0.5, 0.5, 0.5, 0.5)])


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (FULL_IMAGE, 1.0),
        ((0.5, 0.5, 0.25, 0.5), 0.4),
        ((0.5, 0.5, 0.125, 0.5), 0.2),
        ((0.625, 0.75, 0.25, 0.25), (0.4 + 0.1) / 4),
        ((-1.0, 0.0, 1.5, 1.0), 0.4),
        ((0.75, 0.0, 0.25, 0.5), 0.0),
    ],
)
def test_mass_in_box(box, expected):
    assert mass_in_boxes(ATTENTION, [box]) == pytest.approx(expected)
    assert mass_in_boxes(7 * ATTENTION, [box]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("box", "grid", "expected"),
    [
        (FULL_IMAGE, (7, 7), 1.0),
        ((0.0, 0.0, 0.5, 0.5), (14, 14), 0.25),
        ((0.0, 0.0, 0.5, 1.0), (2, 3), 1 / 3),
        ((0.3, 0.3, 0.1, 0.1), (2, 2), 0.0),
    ],
)
def test_peak_by_chance(box, grid, expected):
    assert peak_by_chance([box], grid) == pytest.approx(expected)


def test_peak_by_chance_is_the_mean_over_all_peaks():
    box = (0.2, 0.1, 0.5, 0.6)
    peaks = np.eye(12).reshape(12, 3, 4)
    assert np.mean([peak_in_boxes(peak, [box]) for peak in peaks]) == pytest.approx(peak_by_chance([box], (3, 4)))


LEFT, TOP = (0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 0.5)


def test_attention_in_overlapping_boxes_counts_once():
    assert mass_in_boxes(ATTENTION, [LEFT, TOP]) == pytest.approx(0.1 + 0.1 + 0.1 + 0.2)
    assert mass_by_chance([LEFT, TOP]) == pytest.approx(0.75)
    assert peak_by_chance([LEFT, TOP], (2, 4)) == pytest.approx(0.75)
    assert mass_in_boxes(ATTENTION, [LEFT, LEFT]) == mass_in_boxes(ATTENTION, [LEFT])


def test_a_peak_in_either_box_counts():
    assert not peak_in_boxes(ATTENTION, [LEFT, TOP])
    assert peak_in_boxes(ATTENTION, [TOP, (0.5, 0.5, 0.25, 0.5)])


def test_attention_to_the_sentinel_alone_is_in_no_box():
    assert mass_in_boxes(np.zeros((2, 4)), [FULL_IMAGE]) == 0.0
    assert not peak_in_boxes(np.zeros((2, 4)), [FULL_IMAGE])


def test_without_boxes_all_scores_are_zero():
    assert (mass_in_boxes(ATTENTION, []), mass_by_chance([]), peak_by_chance([], (2, 4))) == (0.0, 0.0, 0.0)
    assert not peak_in_boxes(ATTENTION, [])


@example(np.ones((3, 5), np.float32), 0.0, 1 - 2**-53)
@given(
    arrays.arrays(np.float32, (3, 5), elements=st.floats(0.0, 1.0, width=32)).filter(lambda grid: grid.sum() > 0.01),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
)
def test_mass_of_a_partition_sums_to_one(attention, x, y):
    boxes = [(0.0, 0.0, x, y), (x, 0.0, 1 - x, y), (0.0, y, x, 1 - y), (x, y, 1 - x, 1 - y)]
    assert sum(mass_in_boxes(attention, [box]) for box in boxes) == pytest.approx(1.0)
    assert mass_in_boxes(attention, boxes) == pytest.approx(1.0)
    assert mass_in_boxes(np.ones((3, 5)), boxes[:1]) == pytest.approx(x * y) == mass_by_chance(boxes[:1])


@pytest.mark.parametrize("attention", [np.ones(4), np.array([[np.nan, 1.0]]), np.array([[-1.0, 3.0]])], ids=str)
@pytest.mark.parametrize("score", [mass_in_boxes, peak_in_boxes])
def test_invalid_attention_is_rejected(score, attention):
    with pytest.raises(ValueError, match="must be a 2-D array of weights"):
        score(attention, [FULL_IMAGE])
