"""What the floors are made of: patterns whose detail fades where the picture cannot hold it.

`R` points; `u` and `v` are their places on the floor, float32 [R], in the world's unit of length.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.scenes.scene import Floor
from pipeline.scenes.vectors import Reals, Vector, hashed, noise

_PLANK_WIDTH, _PLANK_LENGTH = 0.42, 2.6
_TILE = 0.8
_THREAD = 0.11


@dataclass(frozen=True, kw_only=True)
class FloorMaterial:
    """The look of one floor."""

    color: Vector
    """Share of red, green and blue light that it throws back on the whole."""
    relief: Callable[[Reals, Reals, Reals], Reals]
    """Factor [R] on the color at `u` and `v`, where one subsample covers `footprint` [R] of floor."""


def _wooden(u: Reals, v: Reals, footprint: Reals) -> Reals:
    plank = np.floor(u / _PLANK_WIDTH)
    v = v + hashed(plank, np.zeros_like(plank)) * _PLANK_LENGTH
    piece = np.floor(v / _PLANK_LENGTH)
    tone = hashed(plank, piece + 17.0)
    grain = 0.34 * noise(u * 15.0, v * 1.1 + tone * 40.0)
    fibre = 0.22 * noise(u * 42.0, v * 2.6) * _kept(0.05, footprint)
    across, along = u - plank * _PLANK_WIDTH, v - piece * _PLANK_LENGTH
    edge = np.minimum(_from_edges(across, _PLANK_WIDTH), _from_edges(along, _PLANK_LENGTH))
    seam = np.clip(1.4 - edge * 83.0, 0.0, 1.0) * _kept(0.06, footprint)
    relief: Reals = (0.62 + 0.34 * tone + grain + fibre) * (1.0 - 0.55 * seam)
    return relief


def _tiled(u: Reals, v: Reals, footprint: Reals) -> Reals:
    across, along = np.floor(u * (1 / _TILE)), np.floor(v * (1 / _TILE))
    edge = np.minimum(_from_edges(u - across * _TILE, _TILE), _from_edges(v - along * _TILE, _TILE))
    grout = _kept(0.06, footprint) * np.clip(1.6 - edge * 62.0, 0.0, 1.0)
    clouds: Reals = 0.12 * noise(u * 3.1, v * 3.1) + 0.06 * noise(u * 9.0, v * 9.0)
    relief: Reals = (0.84 + 0.14 * hashed(across, along) + clouds) * (1.0 - 0.5 * grout)
    return relief


def _sandy(u: Reals, v: Reals, footprint: Reals) -> Reals:
    drift = noise(u * 1.3, v * 1.3)
    ripple = noise(u * 3.0 + drift * 2.0, v * 9.0 + drift * 3.0)
    grains = noise(u * 38.0, v * 38.0) * _kept(0.05, footprint)
    relief: Reals = 0.74 + 0.16 * drift + 0.17 * ripple + 0.26 * grains
    return relief


def _grassy(u: Reals, v: Reals, footprint: Reals) -> Reals:
    clump = noise(u * 1.7, v * 1.7)
    tuft = noise(u * 7.0, v * 7.0 + 31.0)
    blades = noise(u * 26.0 + clump * 3.0, v * 9.0) * _kept(0.05, footprint)
    relief: Reals = 0.44 + 0.30 * clump + 0.38 * tuft + 0.62 * blades * (0.5 + clump)
    return relief


def _carpeted(u: Reals, v: Reals, footprint: Reals) -> Reals:
    across, along = u / _THREAD, v / _THREAD
    crossing = (np.floor(across) + np.floor(along)) * 0.5
    warp_on_top = crossing == np.floor(crossing)
    from_middle = np.where(warp_on_top, across - np.floor(across), along - np.floor(along)) - 0.5
    weave = (0.34 - 1.9 * from_middle * from_middle) * _kept(_THREAD, footprint)
    wear = 0.22 * noise(u * 2.2, v * 2.2) + 0.16 * noise(u * 30.0, v * 30.0) * _kept(0.06, footprint)
    relief: Reals = 0.80 + weave + wear
    return relief


def _from_edges(place: Reals, width: float) -> Reals:
    """Distance [R] to the nearer end of a stretch from 0 to `width`."""
    nearer: Reals = np.minimum(place, width - place)
    return nearer


def _kept(period: float, footprint: Reals) -> Reals:
    """How much [R] of a detail of this length to keep: what a subsample covers whole would only flicker."""
    kept: Reals = np.clip(2.0 - footprint * (2.0 / period), 0.0, 1.0)
    return kept


def linear(red: float, green: float, blue: float) -> Vector:
    """Linear light of a color as the picture shows it, whose encoding is a square root."""
    return (red * red, green * green, blue * blue)


MATERIALS: Mapping[Floor, FloorMaterial] = {
    "wooden": FloorMaterial(color=linear(0.63, 0.46, 0.31), relief=_wooden),
    "tiled": FloorMaterial(color=linear(0.53, 0.58, 0.62), relief=_tiled),
    "sandy": FloorMaterial(color=linear(0.80, 0.71, 0.55), relief=_sandy),
    "grassy": FloorMaterial(color=linear(0.42, 0.52, 0.27), relief=_grassy),
    "carpeted": FloorMaterial(color=linear(0.56, 0.47, 0.52), relief=_carpeted),
}
