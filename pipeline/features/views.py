"""Which part of an image a grid covers: the views of an image, and how they are fitted to the encoder's input.

A view is the whole image or a crop of it, mirrored or not. A feature store can hold several of each image.
"""

from dataclasses import dataclass
from typing import Literal

View = Literal[
    "whole",
    "top_left",
    "top_right",
    "bottom_left",
    "bottom_right",
    "center",
    "whole_flipped",
    "top_left_flipped",
    "top_right_flipped",
    "bottom_left_flipped",
    "bottom_right_flipped",
    "center_flipped",
]
"""Whole image or crop; `flipped` views are mirrored left to right."""

CROP_SCALE = 7 / 8
"""Size of a crop, as a fraction of the image's width and height."""

# Offset of each crop from the left and from the top, as fractions of the margin that the crop leaves.
_CROP_OFFSETS = {
    "top_left": (0.0, 0.0),
    "top_right": (1.0, 0.0),
    "bottom_left": (0.0, 1.0),
    "bottom_right": (1.0, 1.0),
    "center": (0.5, 0.5),
}

Resize = Literal["squash", "center_crop"]
"""How a view is fitted to the encoder's input: by ignoring its aspect ratio, or by cutting off its margins."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in px."""


def is_flipped(view: View) -> bool:
    """Whether a view is mirrored left to right."""
    return view.endswith("_flipped")


def view_box(width: int, height: int, view: View) -> Box | None:
    """Return the part of an image, given by its size in px, that a view shows; None for the whole image."""
    crop = view.removesuffix("_flipped")
    if crop not in _CROP_OFFSETS:
        return None
    left, top = (
        offset * (1 - CROP_SCALE) * side for offset, side in zip(_CROP_OFFSETS[crop], (width, height), strict=True)
    )
    return left, top, left + CROP_SCALE * width, top + CROP_SCALE * height


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """A recipe of evaluation: an image is resized beyond the input's size, and the center is cut out."""

    scale: float
    """Size that the image is resized to, in its tighter dimension, relative to the input's size."""
    resampling: Literal["bilinear", "bicubic"]
    """Interpolation of the resized image."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The encoder's input, and how a view is fitted to it."""

    height: int
    """Height in px."""
    width: int
    """Width in px."""
    center_crop: CenterCrop | None = None
    """The recipe; None resizes with bicubic interpolation and ignores the aspect ratio."""

    def resized(self, width: float, height: float) -> tuple[int, int]:
        """Return the width and height in px that a view is resized to, before the center is cut out.

        Args:
            width: Width of the view in px.
            height: Height of the view in px.
        """
        if self.center_crop is None:
            return self.width, self.height
        min_width, min_height = (round(self.center_crop.scale * side) for side in (self.width, self.height))
        if min_width * height >= min_height * width:
            return min_width, max(min_height, int(min_width * height / width))
        return max(min_width, int(min_height * width / height)), min_height

    def center(self, width: int, height: int) -> tuple[int, int]:
        """Return the left and the top, in px, of the center of a view that was resized to this size."""
        return round((width - self.width) / 2), round((height - self.height) / 2)

    def visible_box(self, width: int, height: int, view: View) -> Box:
        """Return the part of an image that a grid covers.

        Args:
            width: Width of the image in px.
            height: Height of the image in px.
            view: View of the image.
        """
        left, top, right, bottom = view_box(width, height, view) or (0.0, 0.0, float(width), float(height))
        resized_width, resized_height = self.resized(right - left, bottom - top)
        x_scale, y_scale = (right - left) / resized_width, (bottom - top) / resized_height
        x, y = self.center(resized_width, resized_height)
        left, top = left + x_scale * x, top + y_scale * y
        return left, top, min(right, left + x_scale * self.width), min(bottom, top + y_scale * self.height)


def relative_box(
    box: tuple[float, float, float, float], visible: Box, width: int, height: int, view: View
) -> tuple[float, float, float, float]:
    """Convert a box in an image to a box in the part of it that a grid covers.

    Args:
        box: Left, top, width and height, as fractions of the image's width and height.
        visible: The part, from `Frame.visible_box`.
        width: Width of the image in px.
        height: Height of the image in px.
        view: View of the image; a flipped view mirrors the box.

    Returns:
        Left, top, width and height, as fractions of the part's width and height.
    """
    left, top, right, bottom = visible
    x_scale, y_scale = width / (right - left), height / (bottom - top)
    x = (box[0] - left / width) * x_scale
    box_width, box_height = box[2] * x_scale, box[3] * y_scale
    return 1 - x - box_width if is_flipped(view) else x, (box[1] - top / height) * y_scale, box_width, box_height
