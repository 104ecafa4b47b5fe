"""Whether attention lies where the thing is: attention maps against boxes.

Legend: `H` x `W` the grid of regions, row 0 at the top. A box is left, top, width and height, as fractions of
the image's width and height; a region counts as its centre or as its cell, the 1/H x 1/W rectangle around it.
"""

import numpy as np
import numpy.typing as npt

Box = tuple[float, float, float, float]
Attention = npt.NDArray[np.floating]

PROTOCOL: dict[str, str] = {
    "metric": "attention in the box of the thing named: peak and mass",
    "peak": "centre of the region with most attention lies in the box",
    "mass": "share of attention in the box, regions weighted by the part of their cell that it covers",
    "chance": "share of region centres in the box",
    "reference": "pointing game of Zhang et al. 2016, on the decoder's grid",
}


def peak_in_box(attention: Attention, box: Box) -> bool:
    """Whether the centre of the region with most attention lies in the box, for attention [H, W].

    Of regions that tie, the first in reading order counts. Raises `ValueError` as `mass_in_box` does.
    """
    weights = _checked(attention)
    peak = np.unravel_index(np.argmax(weights), weights.shape)
    return bool(_centres_inside(box, weights.shape)[peak])


def mass_in_box(attention: Attention, box: Box) -> float:
    """Share, in 0 to 1, of the attention [H, W] that falls in the box; a cell counts by the part in the box.

    Uniform attention gives the box's share of the image. Raises `ValueError` where the attention is no grid,
    has a negative or non-finite value, or sums to 0.
    """
    weights = _checked(attention)
    left, top, width, height = box
    rows = _covered(top, height, weights.shape[0])
    columns = _covered(left, width, weights.shape[1])
    return float(rows @ weights @ columns / weights.sum())


def chance(box: Box, grid: tuple[int, int]) -> float:
    """Share of region centres of an H x W grid that lie in the box: how often a random peak does."""
    return float(_centres_inside(box, grid).mean())


def _checked(attention: Attention) -> npt.NDArray[np.float64]:
    weights = np.asarray(attention, dtype=np.float64)
    if weights.ndim != 2 or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
        raise ValueError(f"attention of shape {weights.shape} must be a grid of weights >= 0 with a sum > 0")
    return weights


def _centres_inside(box: Box, grid: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """[H, W]; left and top edges belong to a box, right and bottom ones to the box beside it."""
    left, top, width, height = box
    y = (np.arange(grid[0]) + 0.5) / grid[0]
    x = (np.arange(grid[1]) + 0.5) / grid[1]
    inside: npt.NDArray[np.bool_] = np.logical_and.outer(
        (top <= y) & (y < top + height), (left <= x) & (x < left + width)
    )
    return inside


def _covered(start: float, extent: float, cells: int) -> npt.NDArray[np.float64]:
    """Part of each of `cells` equal cells of the unit interval that the span covers."""
    edges = np.arange(cells + 1) / cells
    overlap = np.minimum(edges[1:], start + extent) - np.maximum(edges[:-1], start)
    covered: npt.NDArray[np.float64] = np.clip(overlap * cells, 0.0, 1.0)
    return covered
