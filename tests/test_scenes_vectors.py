import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scenes.vectors import column, dot, lattice_noise, length, mix, normalize, smoothstep, value_noise

coordinates = st.lists(
    st.tuples(st.floats(-300, 300, width=32), st.floats(-300, 300, width=32)), min_size=1, max_size=20
)


@given(coordinates=coordinates)
def test_value_noise_is_in_range_and_equals_lattice_noise_at_integer_coordinates(coordinates):
    u, v = np.array(coordinates, dtype=np.float32).T
    values = value_noise(u, v)
    assert values.dtype == np.float32
    assert ((values >= 0) & (values <= 1)).all()
    integer_u, integer_v = np.floor(u), np.floor(v)
    assert (value_noise(integer_u, integer_v) == lattice_noise(integer_u, integer_v)).all()


@given(u=st.integers(-600, 600), v=st.floats(-600, 600, width=32))
def test_value_noise_is_continuous(u, v):
    u_pair = np.array([u - 1e-3, u + 1e-3], dtype=np.float32)
    left, right = value_noise(u_pair, np.full(2, v, dtype=np.float32))
    assert left == pytest.approx(right, abs=1e-3)


def test_lattice_noise_is_uniform_and_uncorrelated():
    u, v = (axis.ravel().astype(np.float32) for axis in np.meshgrid(np.arange(256), np.arange(256)))
    values = lattice_noise(u, v)
    counts = np.histogram(values, bins=16, range=(0, 1))[0]
    assert counts.min() > 0.9 * counts.mean()
    for shift in (1, 256):
        assert abs(np.corrcoef(values[:-shift], values[shift:])[0, 1]) < 0.02


def test_mix_and_smoothstep_at_both_ends_and_in_the_middle():
    t = np.array([0.0, 0.5, 1.0], dtype=np.float32)
    assert smoothstep(t).tolist() == [0.0, 0.5, 1.0]
    assert mix(np.float32(2) + 0 * t, np.float32(6) + 0 * t, t).tolist() == [2.0, 4.0, 6.0]


def test_vector_arithmetic_worked_by_hand():
    vectors = np.array([[3, 0], [4, 0], [0, 2]], dtype=np.float32)
    assert length(*vectors).tolist() == [5.0, 2.0]
    assert dot(vectors, (1.0, 1.0, 1.0)).tolist() == [7.0, 2.0]
    assert normalize(vectors)[:, 1].tolist() == [0.0, 0.0, 1.0]
    assert (vectors + column((1.0, 0.0, -1.0)))[:, 0].tolist() == [4.0, 4.0, -1.0]
