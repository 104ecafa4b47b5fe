"""Vectors and noise for the renderer, by operations alone whose result IEEE 754 defines to the last bit.

`R` points or rays in a flat array; vectors are float32 [3, R].
"""

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float32]
Vector = tuple[float, float, float]


def column(vector: Vector) -> Reals:
    """One vector as [3, 1], for arithmetic with [3, R]."""
    return np.array(vector, dtype=np.float32)[:, None]


def dot(a: Reals, b: Reals | Vector) -> Reals:
    """Scalar products [R]. Not a matrix product, since libraries add up in orders of their own."""
    product: Reals = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return product


def length(*parts: Reals) -> Reals:
    """Lengths [R] of vectors given part by part, each [R]."""
    squared = parts[0] * parts[0]
    for part in parts[1:]:
        squared = squared + part * part
    root: Reals = np.sqrt(squared)
    return root


def unit(vectors: Reals) -> Reals:
    """Vectors [3, R] scaled to length 1."""
    scaled: Reals = vectors / length(*vectors)
    return scaled


def mix(first: Reals, second: Reals, share: Reals) -> Reals:
    """`first` where the share [R] of `second` is 0, `second` where it is 1, and between."""
    mixed: Reals = first + (second - first) * share
    return mixed


def eased(share: Reals) -> Reals:
    """A share [R], 0 to 1, that sets out and arrives gently."""
    smooth: Reals = share * share * (3.0 - 2.0 * share)
    return smooth


def hashed(u: Reals, v: Reals) -> Reals:
    """A value [R] in [0, 1) for each whole-numbered place; places repeat every 256."""
    value: Reals = _LATTICE[((v.astype(np.int32) & 255) << 8) | (u.astype(np.int32) & 255)]
    return value


def noise(u: Reals, v: Reals) -> Reals:
    """Smooth noise [R] in [0, 1) that varies over a unit of length."""
    left, top = np.floor(u), np.floor(v)
    across, along = eased(u - left), eased(v - top)
    column, row = left.astype(np.int32) & 255, (top.astype(np.int32) & 255) << 8
    next_column, next_row = (column + 1) & 255, (row + 256) & 0xFFFF
    upper = mix(_LATTICE[row | column], _LATTICE[row | next_column], across)
    lower = mix(_LATTICE[next_row | column], _LATTICE[next_row | next_column], across)
    return mix(upper, lower, along)


def _lattice() -> Reals:
    """256 x 256 values in [0, 1), hashed from their places."""
    place = np.arange(256 * 256, dtype=np.uint32)
    for factor in (0x9E3779B1, 0x85EBCA6B):
        place = (place ^ (place >> np.uint32(15))) * np.uint32(factor)
    place ^= place >> np.uint32(16)
    # 24 bits are what float32 holds exactly.
    return (place >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)


_LATTICE = _lattice()
