"""Vector arithmetic and noise for the renderer, from operations that IEEE 754 defines exactly.

R rays or points in a flat array; vectors are float32 [3, R].
"""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Vector = tuple[float, float, float]


def column(vector: Vector) -> FloatArray:
    """Convert a vector to an array [3, 1] that broadcasts with [3, R]."""
    return np.array(vector, dtype=np.float32)[:, None]


def dot(a: FloatArray, b: FloatArray | Vector) -> FloatArray:
    """Return dot products [R]."""
    # Not a matrix product: libraries differ in the order of summation.
    product: FloatArray = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return product


def length(*components: FloatArray) -> FloatArray:
    """Return Euclidean lengths [R] of vectors with the given components, each [R]."""
    squared = components[0] * components[0]
    for component in components[1:]:
        squared = squared + component * component
    root: FloatArray = np.sqrt(squared)
    return root


def normalize(vectors: FloatArray) -> FloatArray:
    """Scale vectors [3, R] to unit length."""
    scaled: FloatArray = vectors / length(*vectors)
    return scaled


def mix(a: FloatArray, b: FloatArray, t: FloatArray) -> FloatArray:
    """Interpolate linearly: `a` where `t` [R] is 0, `b` where it is 1."""
    mixed: FloatArray = a + (b - a) * t
    return mixed


def smoothstep(t: FloatArray) -> FloatArray:
    """Map `t` [R] in [0, 1] to [0, 1] with zero slope at both ends: 3 t^2 - 2 t^3."""
    smooth: FloatArray = t * t * (3.0 - 2.0 * t)
    return smooth


def lattice_noise(u: FloatArray, v: FloatArray) -> FloatArray:
    """Return white noise [R] in [0, 1) at integer coordinates, with period 256 in `u` and `v`."""
    return _LATTICE.take(_lattice_index(u, v))


def value_noise(u: FloatArray, v: FloatArray) -> FloatArray:
    """Return smooth noise [R] in [0, 1): the lattice noise, interpolated between integer coordinates."""
    left, top = np.floor(u), np.floor(v)
    t_u, t_v = smoothstep(u - left), smoothstep(v - top)
    corners = _LATTICE_CELLS.take(_lattice_index(left, top), axis=0)  # [R, 4]
    upper = corners[:, 0] + corners[:, 1] * t_u
    lower = corners[:, 2] + corners[:, 3] * t_u
    return mix(upper, lower, t_v)


def _lattice_index(u: FloatArray, v: FloatArray) -> NDArray[np.int32]:
    """Return the indices [R] of integer coordinates in the lattice."""
    index: NDArray[np.int32] = ((v.astype(np.int32) & 255) << 8) | (u.astype(np.int32) & 255)
    return index


def _make_lattice() -> FloatArray:
    """Return 256 x 256 values in [0, 1), each an integer hash of its index."""
    value = np.arange(256 * 256, dtype=np.uint32)
    for factor in (0x9E3779B1, 0x85EBCA6B):
        value = (value ^ (value >> np.uint32(15))) * np.uint32(factor)
    value ^= value >> np.uint32(16)
    # float32 represents integers of 24 bits exactly.
    return (value >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)


def _make_lattice_cells(lattice: FloatArray) -> FloatArray:
    """Return, for each value of the lattice, itself and its difference to the next in `u`; the same at the next `v`."""
    values = lattice.reshape(256, 256)
    row = np.stack([values, np.roll(values, -1, axis=1) - values], axis=-1)  # [v, u, 2]
    return np.concatenate([row, np.roll(row, -1, axis=0)], axis=-1).reshape(-1, 4)


_LATTICE = _make_lattice()
_LATTICE_CELLS = _make_lattice_cells(_LATTICE)
