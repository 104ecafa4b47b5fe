"""Procedural textures of the floors. Details too fine for the image resolution fade out.

R points; `u` and `v` are their coordinates on the floor, float32 [R], in world units.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.scenes.scene import Floor
from pipeline.scenes.vectors import FloatArray, Vector, lattice_noise, value_noise

_PLANK_WIDTH, _PLANK_LENGTH = 0.42, 2.6
_TILE_SIZE = 0.8
_THREAD_WIDTH = 0.11


@dataclass(frozen=True, kw_only=True)
class FloorTexture:
    """The texture of a floor: a mean color and a pattern that modulates it."""

    albedo: Vector
    """Mean fraction of red, green and blue light that the floor reflects."""
    pattern: Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
    """Maps `u`, `v` and `footprint`, the width of a subsample on the floor, to factors on the albedo; all are [R]."""


def _wooden(u: FloatArray, v: FloatArray, footprint: FloatArray) -> FloatArray:
    plank = np.floor(u / _PLANK_WIDTH)
    v = v + lattice_noise(plank, np.zeros_like(plank)) * _PLANK_LENGTH
    piece = np.floor(v / _PLANK_LENGTH)
    tone = lattice_noise(plank, piece + 17.0)
    grain = 0.34 * value_noise(u * 15.0, v * 1.1 + tone * 40.0)
    fiber = 0.22 * value_noise(u * 42.0, v * 2.6) * _detail_weight(0.05, footprint)
    plank_u, plank_v = u - plank * _PLANK_WIDTH, v - piece * _PLANK_LENGTH
    edge = np.minimum(_edge_distance(plank_u, _PLANK_WIDTH), _edge_distance(plank_v, _PLANK_LENGTH))
    seam = np.clip(1.4 - edge * 83.0, 0.0, 1.0) * _detail_weight(0.06, footprint)
    pattern: FloatArray = (0.62 + 0.34 * tone + grain + fiber) * (1.0 - 0.55 * seam)
    return pattern


def _tiled(u: FloatArray, v: FloatArray, footprint: FloatArray) -> FloatArray:
    column, row = np.floor(u * (1 / _TILE_SIZE)), np.floor(v * (1 / _TILE_SIZE))
    edge = np.minimum(
        _edge_distance(u - column * _TILE_SIZE, _TILE_SIZE), _edge_distance(v - row * _TILE_SIZE, _TILE_SIZE)
    )
    grout = _detail_weight(0.06, footprint) * np.clip(1.6 - edge * 62.0, 0.0, 1.0)
    clouds: FloatArray = 0.12 * value_noise(u * 3.1, v * 3.1) + 0.06 * value_noise(u * 9.0, v * 9.0)
    pattern: FloatArray = (0.84 + 0.14 * lattice_noise(column, row) + clouds) * (1.0 - 0.5 * grout)
    return pattern


def _sandy(u: FloatArray, v: FloatArray, footprint: FloatArray) -> FloatArray:
    drift = value_noise(u * 1.3, v * 1.3)
    ripple = value_noise(u * 3.0 + drift * 2.0, v * 9.0 + drift * 3.0)
    grains = value_noise(u * 38.0, v * 38.0) * _detail_weight(0.05, footprint)
    pattern: FloatArray = 0.74 + 0.16 * drift + 0.17 * ripple + 0.26 * grains
    return pattern


def _grassy(u: FloatArray, v: FloatArray, footprint: FloatArray) -> FloatArray:
    clump = value_noise(u * 1.7, v * 1.7)
    tuft = value_noise(u * 7.0, v * 7.0 + 31.0)
    blades = value_noise(u * 26.0 + clump * 3.0, v * 9.0) * _detail_weight(0.05, footprint)
    pattern: FloatArray = 0.44 + 0.30 * clump + 0.38 * tuft + 0.62 * blades * (0.5 + clump)
    return pattern


def _carpeted(u: FloatArray, v: FloatArray, footprint: FloatArray) -> FloatArray:
    warp, weft = u / _THREAD_WIDTH, v / _THREAD_WIDTH
    crossing = (np.floor(warp) + np.floor(weft)) * 0.5
    warp_on_top = crossing == np.floor(crossing)
    thread_offset = np.where(warp_on_top, warp - np.floor(warp), weft - np.floor(weft)) - 0.5
    weave = (0.34 - 1.9 * thread_offset * thread_offset) * _detail_weight(_THREAD_WIDTH, footprint)
    wear = 0.22 * value_noise(u * 2.2, v * 2.2) + 0.16 * value_noise(u * 30.0, v * 30.0) * _detail_weight(
        0.06, footprint
    )
    pattern: FloatArray = 0.80 + weave + wear
    return pattern


def _edge_distance(offset: FloatArray, width: float) -> FloatArray:
    """Return the distance [R] from `offset` to the nearer end of the interval [0, width]."""
    distance: FloatArray = np.minimum(offset, width - offset)
    return distance


def _detail_weight(period: float, footprint: FloatArray) -> FloatArray:
    """Return the weight [R] of a detail of this period: 0 where a subsample covers a period, to prevent aliasing."""
    weight: FloatArray = np.clip(2.0 - footprint * (2.0 / period), 0.0, 1.0)
    return weight


def linear_rgb(red: float, green: float, blue: float) -> Vector:
    """Convert a display color to linear light; the display encoding is a square root (gamma 2)."""
    return (red * red, green * green, blue * blue)


FLOOR_TEXTURES: Mapping[Floor, FloorTexture] = {
    "wooden": FloorTexture(albedo=linear_rgb(0.63, 0.46, 0.31), pattern=_wooden),
    "tiled": FloorTexture(albedo=linear_rgb(0.53, 0.58, 0.62), pattern=_tiled),
    "sandy": FloorTexture(albedo=linear_rgb(0.80, 0.71, 0.55), pattern=_sandy),
    "grassy": FloorTexture(albedo=linear_rgb(0.42, 0.52, 0.27), pattern=_grassy),
    "carpeted": FloorTexture(albedo=linear_rgb(0.56, 0.47, 0.52), pattern=_carpeted),
}
