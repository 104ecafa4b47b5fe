"""The world of the embedded dataset: what a scene may hold, and how one is drawn at random.

The ground is the plane y = 0 with x to the right and z away from the camera; lengths are in units of about the
height of a large object.
"""

from dataclasses import dataclass
from typing import Literal

Shape = Literal["sphere", "cube", "cylinder", "cone", "ring", "pyramid"]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "white", "black"]
Size = Literal["small", "large"]
Texture = Literal["matte", "shiny", "striped", "spotted"]
Floor = Literal["wooden", "tiled", "sandy", "grassy", "carpeted"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """One object that stands on the floor."""

    shape: Shape
    colour: Colour
    size: Size
    texture: Texture
    x: float
    z: float
    turn: float
    """Rotation about the vertical axis, in turns (0 to 1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One to four bodies on a lit floor, seen by a camera."""

    bodies: tuple[Body, ...]
    floor: Floor
    hue_shift: tuple[float, float, float]
    """Factors on red, green and blue of the floor and backdrop: no two floors have quite the same colour."""
    light: tuple[float, float, float]
    """Direction towards the lamp, a unit vector with y > 0."""
    brightness: float
    """Factor on the lamp's light, about 1."""
    camera_height: float
    camera_tilt: float
    """Fall of the line of sight for each unit of z."""
