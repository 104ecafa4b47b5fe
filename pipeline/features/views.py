"""The views of an image: whole or a crop, mirrored or not. A feature store can hold several of each image."""

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
