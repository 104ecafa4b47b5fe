"""Whether attention lies where the thing is: attention maps against boxes.

Legend: `H` x `W` the grid of regions, row 0 at the top. A box is left, top, width and height, as fractions of
the image's width and height; a region counts as its center or as its cell, the 1/H x 1/W rectangle around it.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Box = tuple[float, float, float, float]
Attention = npt.NDArray[np.floating]

PROTOCOL: dict[str, str] = {
    "metric": "attention in the boxes of the things that a word speaks of",
    "peak": "center of the region with most attention lies in a box",
    "mass": "share of attention in the boxes, regions weighted by the part of their cell that they cover",
    "chance": "of the peak: share of region centers in the boxes; of the mass: share of the image in the boxes",
    "reference": "pointing game of Zhang et al. 2016, on the decoder's grid",
}


def peak_in_boxes(attention: Attention, boxes: Sequence[Box]) -> bool:
    """Whether the center of the region with most attention lies in a box, for attention [H, W].

    Of regions that tie, the first in reading order counts. Raises `ValueError` as `mass_in_boxes` does.
    """
    weights = _checked(attention)
    peak = np.unravel_index(np.argmax(weights), weights.shape)
    return bool(_centers_inside(boxes, weights.shape)[peak])


def mass_in_boxes(attention: Attention, boxes: Sequence[Box]) -> float:
    """Share, in 0 to 1, of the attention [H, W] that falls in the boxes; a cell counts by the part in them.

    Where boxes overlap, attention counts once. Raises `ValueError` where the attention is no grid, has a negative or
    non-finite value, or sums to 0.
    """
    weights = _checked(attention)
    return float((weights * _covered(boxes, weights.shape)).sum() / weights.sum())


def peak_by_chance(boxes: Sequence[Box], grid: tuple[int, int]) -> float:
    """Share of region centers of an H x W grid that lie in the boxes: how often a random peak does."""
    return float(_centers_inside(boxes, grid).mean())


def mass_by_chance(boxes: Sequence[Box]) -> float:
    """Share of the image that lies in the boxes: how much of uniform attention does, on any grid."""
    return float(_covered(boxes, (1, 1)).item())


def _checked(attention: Attention) -> npt.NDArray[np.float64]:
    weights = np.asarray(attention, dtype=np.float64)
    if weights.ndim != 2 or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
        raise ValueError(f"attention of shape {weights.shape} must be a grid of weights >= 0 with a sum > 0")
    return weights


def _centers_inside(boxes: Sequence[Box], grid: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """[H, W]: which regions have their center in a box."""
    y, x = ((np.arange(cells) + 0.5) / cells for cells in grid)
    return _inside(boxes, y, x)


def _covered(boxes: Sequence[Box], grid: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """[H, W]: the part of each cell that lies in a box."""
    y, rows, heights = _pieces([edge for _, top, _, height in boxes for edge in (top, top + height)], grid[0])
    x, columns, widths = _pieces([edge for left, _, width, _ in boxes for edge in (left, left + width)], grid[1])
    covered = np.zeros(grid)
    np.add.at(covered, np.ix_(rows, columns), _inside(boxes, y, x) * np.multiply.outer(heights, widths))
    return covered


def _pieces(
    edges: Sequence[float], cells: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Cut the unit interval at the edges of boxes and of equal cells, so that a piece lies in a box or outside.

    Returns of each piece its middle, the number of its cell and its length as a share of a cell.
    """
    cuts = np.unique(np.clip([*np.arange(cells + 1) / cells, *edges], 0.0, 1.0))
    middles = (cuts[1:] + cuts[:-1]) / 2
    # The middle of a last piece too thin for floats is 1, which no cell begins at.
    return middles, np.minimum(middles * cells, cells - 1).astype(np.intp), np.diff(cuts) * cells


def _inside(boxes: Sequence[Box], y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """[y, x]: which points lie in a box; left and top edges belong to it, right and bottom ones to the box beside."""
    inside = np.zeros((len(y), len(x)), dtype=np.bool_)
    for left, top, width, height in boxes:
        inside |= np.logical_and.outer((top <= y) & (y < top + height), (left <= x) & (x < left + width))
    return inside
