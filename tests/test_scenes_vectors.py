import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scenes.vectors import eased, hashed, mix, noise

places = st.lists(st.tuples(st.floats(-300, 300, width=32), st.floats(-300, 300, width=32)), min_size=1, max_size=20)


@given(places=places)
def test_noise_stays_in_range_and_equals_the_lattice_at_whole_places(places):
    u, v = np.array(places, dtype=np.float32).T
    values = noise(u, v)
    assert values.dtype == np.float32
    assert ((values >= 0) & (values <= 1)).all()
    whole_u, whole_v = np.floor(u), np.floor(v)
    assert (noise(whole_u, whole_v) == hashed(whole_u, whole_v)).all()


@given(u=st.integers(-600, 600), v=st.floats(-600, 600, width=32))
def test_noise_has_no_seams(u, v):
    sides = np.array([u - 1e-3, u + 1e-3], dtype=np.float32)
    left, right = noise(sides, np.full(2, v, dtype=np.float32))
    assert left == pytest.approx(right, abs=1e-3)


def test_hashed_values_are_spread_evenly_and_unlike_their_neighbors():
    u, v = (axis.ravel().astype(np.float32) for axis in np.meshgrid(np.arange(256), np.arange(256)))
    values = hashed(u, v)
    counts = np.histogram(values, bins=16, range=(0, 1))[0]
    assert counts.min() > 0.9 * counts.mean()
    for shift in (1, 256):
        assert abs(np.corrcoef(values[:-shift], values[shift:])[0, 1]) < 0.02


def test_mix_and_eased_go_from_end_to_end():
    share = np.array([0.0, 0.5, 1.0], dtype=np.float32)
    assert eased(share).tolist() == [0.0, 0.5, 1.0]
    assert mix(np.float32(2) + 0 * share, np.float32(6) + 0 * share, share).tolist() == [2.0, 4.0, 6.0]
