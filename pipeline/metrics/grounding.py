"""Grounding of attention: whether the attention of a word lies in the boxes of the objects that it refers to.

Legend: `H` x `W` grid of regions, row 0 at the top. Each region is a cell of 1/H x 1/W of the image.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Box = tuple[float, float, float, float]
"""Left, top, width and height, as fractions of the width and height of the image."""
Attention = npt.NDArray[np.floating]
"""Attention weights of a word, [H, W]."""

PROTOCOL: dict[str, str] = {
    "metric": "attention in the boxes of the objects that a word refers to",
    "peak": "the center of the region with the most attention lies in a box",
    "mass": "fraction of the attention to the image in the boxes, cells weighted by the part that the boxes cover",
    "chance": "of the peak: fraction of region centers in the boxes; of the mass: fraction of the image in the boxes",
    "reference": "pointing game of Zhang et al. 2016, on the decoder's grid",
}


def peak_in_boxes(attention: Attention, boxes: Sequence[Box]) -> bool:
    """Return whether the center of the most attended region lies in a box (pointing game, Zhang et al. 2016).

    Args:
        attention: Attention weights [H, W]. The first region in row-major order wins a tie; without any attention, no
            region does.
        boxes: Boxes of the objects.

    Raises:
        ValueError: As `mass_in_boxes`.
    """
    weights = _check_attention(attention)
    peak = np.unravel_index(np.argmax(weights), weights.shape)
    return bool(weights[peak] > 0 and _centers_in_boxes(boxes, weights.shape)[peak])


def mass_in_boxes(attention: Attention, boxes: Sequence[Box]) -> float:
    """Compute the fraction of the attention that lies in the boxes.

    Args:
        attention: Attention weights [H, W] of any sum; a sum of 0, with all attention on a visual sentinel, gives 0.
        boxes: Boxes of the objects; where they overlap, the attention counts once.

    Raises:
        ValueError: The attention is not two-dimensional, or has a negative or non-finite value.
    """
    weights = _check_attention(attention)
    in_boxes = (weights * _covered_fraction(boxes, weights.shape)).sum()
    return float(in_boxes / weights.sum()) if in_boxes else 0.0


def peak_by_chance(boxes: Sequence[Box], grid: tuple[int, ...]) -> float:
    """Compute the probability that a random region has its center in a box.

    Args:
        boxes: Boxes of the objects.
        grid: H and W.
    """
    return float(_centers_in_boxes(boxes, grid).mean())


def mass_by_chance(boxes: Sequence[Box]) -> float:
    """Compute the fraction of the image in the boxes: the mass of uniform attention, on any grid."""
    return float(_covered_fraction(boxes, (1, 1)).item())


def _check_attention(attention: Attention) -> npt.NDArray[np.float64]:
    weights = np.asarray(attention, dtype=np.float64)
    if weights.ndim != 2 or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"attention must be a 2-D array of weights >= 0, got shape {weights.shape}")
    return weights


def _centers_in_boxes(boxes: Sequence[Box], grid: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Return a mask [H, W] of the regions whose center lies in a box."""
    y, x = ((np.arange(size) + 0.5) / size for size in grid)
    return _points_in_boxes(boxes, y, x)


def _covered_fraction(boxes: Sequence[Box], grid: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Compute the fraction of each cell that the boxes cover, [H, W]."""
    y, rows, heights = _segments([edge for _, top, _, height in boxes for edge in (top, top + height)], grid[0])
    x, columns, widths = _segments([edge for left, _, width, _ in boxes for edge in (left, left + width)], grid[1])
    covered = np.zeros(grid)
    np.add.at(covered, np.ix_(rows, columns), _points_in_boxes(boxes, y, x) * np.multiply.outer(heights, widths))
    return covered


def _segments(
    edges: Sequence[float], num_cells: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Cut the unit interval at box edges and cell edges, so that each segment lies inside or outside of a box.

    Args:
        edges: Box edges along one axis.
        num_cells: Number of cells along this axis.

    Returns:
        The middle of each segment, the index of its cell, and its length as a fraction of a cell.
    """
    cuts = np.unique(np.clip([*np.arange(num_cells + 1) / num_cells, *edges], 0.0, 1.0))
    middles = (cuts[1:] + cuts[:-1]) / 2
    # The middle of a very short last segment rounds to 1, which is beyond the last cell.
    return middles, np.minimum(middles * num_cells, num_cells - 1).astype(np.intp), np.diff(cuts) * num_cells


def _points_in_boxes(
    boxes: Sequence[Box], y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """Return a mask of the points that lie in a box, [len(y), len(x)].

    Left and top edges of a box are inside, right and bottom edges outside.
    """
    inside = np.zeros((len(y), len(x)), dtype=np.bool_)
    for left, top, width, height in boxes:
        inside |= np.logical_and.outer((top <= y) & (y < top + height), (left <= x) & (x < left + width))
    return inside
