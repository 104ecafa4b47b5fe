import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.evaluation.grounding import chance, mass_in_box, peak_in_box

WHOLE = (0.0, 0.0, 1.0, 1.0)
# Two rows, four columns; the peak is in row 1, column 2, whose centre lies at x = 0.625, y = 0.75.
ATTENTION = np.array([[0.1, 0.1, 0.1, 0.0], [0.0, 0.2, 0.4, 0.1]])


@pytest.mark.parametrize(
    ("box", "wanted"),
    [
        (WHOLE, True),
        ((0.5, 0.5, 0.25, 0.5), True),
        ((0.6, 0.7, 0.05, 0.1), True),
        ((0.0, 0.0, 1.0, 0.5), False),
        ((0.5, 0.5, 0.125, 0.5), False),
        ((0.625, 0.75, 0.1, 0.1), True),
        ((0.7, 0.5, 0.3, 0.5), False),
    ],
)
def test_peak_in_box(box, wanted):
    assert peak_in_box(ATTENTION, box) is wanted


def test_first_of_equal_peaks_counts():
    assert peak_in_box(np.ones((2, 2)), (0.0, 0.0, 0.5, 0.5))
    assert not peak_in_box(np.ones((2, 2)), (0.5, 0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("box", "wanted"),
    [
        (WHOLE, 1.0),
        ((0.5, 0.5, 0.25, 0.5), 0.4),
        ((0.5, 0.5, 0.125, 0.5), 0.2),
        ((0.625, 0.75, 0.25, 0.25), (0.4 + 0.1) / 4),
        ((-1.0, 0.0, 1.5, 1.0), 0.4),
        ((0.75, 0.0, 0.25, 0.5), 0.0),
    ],
)
def test_mass_in_box(box, wanted):
    assert mass_in_box(ATTENTION, box) == pytest.approx(wanted)
    assert mass_in_box(7 * ATTENTION, box) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("box", "grid", "wanted"),
    [
        (WHOLE, (7, 7), 1.0),
        ((0.0, 0.0, 0.5, 0.5), (14, 14), 0.25),
        ((0.0, 0.0, 0.5, 1.0), (2, 3), 1 / 3),
        ((0.3, 0.3, 0.1, 0.1), (2, 2), 0.0),
    ],
)
def test_chance(box, grid, wanted):
    assert chance(box, grid) == pytest.approx(wanted)


def test_chance_is_how_often_a_peak_at_random_lies_in_the_box():
    box = (0.2, 0.1, 0.5, 0.6)
    peaks = np.eye(12).reshape(12, 3, 4)
    assert np.mean([peak_in_box(peak, box) for peak in peaks]) == pytest.approx(chance(box, (3, 4)))


@given(
    arrays.arrays(np.float32, (3, 5), elements=st.floats(0.0, 1.0, width=32)).filter(lambda grid: grid.sum() > 0.01),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
)
def test_boxes_that_part_the_image_part_the_mass(attention, x, y):
    boxes = [(0.0, 0.0, x, y), (x, 0.0, 1 - x, y), (0.0, y, x, 1 - y), (x, y, 1 - x, 1 - y)]
    assert sum(mass_in_box(attention, box) for box in boxes) == pytest.approx(1.0)
    assert mass_in_box(np.ones((3, 5)), boxes[0]) == pytest.approx(x * y)


@pytest.mark.parametrize(
    "attention", [np.zeros((2, 2)), np.ones(4), np.array([[np.nan, 1.0]]), np.array([[-1.0, 3.0]])], ids=str
)
@pytest.mark.parametrize("score", [mass_in_box, peak_in_box])
def test_what_is_no_attention_is_refused(score, attention):
    with pytest.raises(ValueError, match="must be a grid of weights"):
        score(attention, WHOLE)
