"""The world of the embedded dataset: what a scene may hold, and how one is drawn at random.

The ground is the plane y = 0 with x to the right and z away from the camera; lengths are in units of about
the height of a large object.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Literal, get_args

import numpy as np

Shape = Literal["sphere", "cube", "cylinder", "cone", "ring", "pyramid"]
Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "white", "black"]
Size = Literal["small", "large"]
Texture = Literal["matte", "shiny", "striped", "spotted"]
Floor = Literal["wooden", "tiled", "sandy", "grassy", "carpeted"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLORS: tuple[Color, ...] = get_args(Color)
SIZES: tuple[Size, ...] = get_args(Size)
TEXTURES: tuple[Texture, ...] = get_args(Texture)
FLOORS: tuple[Floor, ...] = get_args(Floor)

# Bodies are seen whole where NEAREST <= z <= FARTHEST and |x| <= SPREAD * z - FRAME_MARGIN[size].
NEAREST, FARTHEST = 4.9, 9.2
SPREAD = 0.27
FRAME_MARGIN: dict[Size, float] = {"small": 0.21, "large": 0.45}

FOOTPRINT: dict[Size, float] = {"small": 0.385, "large": 0.6}
"""Radius of a circle on the ground that holds any body of the size, however it is turned."""
GAP = 0.15
"""Least room between the footprints of two bodies."""

_COUNT_WEIGHTS = (0.12, 0.33, 0.33, 0.22)
"""For scenes of one body, of two, and so on."""
_TEXTURE_WEIGHTS = (0.4, 0.2, 0.2, 0.2)
"""One for each of `TEXTURES`."""
_PLACINGS_TRIED = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """One object that stands on the floor."""

    shape: Shape
    color: Color
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
    """Factors on red, green and blue of the floor and backdrop: no two floors have quite the same color."""
    light: tuple[float, float, float]
    """Direction towards the lamp, a unit vector with y > 0."""
    brightness: float
    """Factor on the lamp's light, about 1."""
    camera_height: float
    camera_tilt: float
    """Fall of the line of sight for each unit of z."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """What bodies that are alike share."""

    shape: Shape
    color: Color
    size: Size
    texture: Texture


def draw_scene(
    rng: np.random.Generator,
    *,
    forbidden: frozenset[tuple[Color, Shape]],
    required: tuple[Color, Shape] | None,
    duplicate_rate: float,
) -> Scene:
    """Draw a scene at random.

    Bodies stand apart and whole inside the frame; those of one color and shape are alike in all, as some are in a
    share `alike` of the scenes with more than one body. No body is a `forbidden` pair, except that at least one is
    the `required` pair, forbidden or not. At least four pairs must stay allowed.

    Only exact arithmetic is used, so one generator state gives one scene on every machine.
    """
    camera_height = rng.uniform(2.2, 3.2)
    return Scene(
        bodies=_placed(rng, _looks(rng, forbidden, required, duplicate_rate)),
        floor=FLOORS[rng.integers(len(FLOORS))],
        hue_shift=(rng.uniform(0.88, 1.12), rng.uniform(0.88, 1.12), rng.uniform(0.88, 1.12)),
        light=_unit(rng.uniform(-0.7, 0.7), 1.0, rng.uniform(-0.9, -0.2)),
        brightness=rng.uniform(0.85, 1.15),
        camera_height=camera_height,
        # Looks at a point 0.4 above the middle of the ground, give or take.
        camera_tilt=(camera_height - 0.4) / 7 + rng.uniform(-0.015, 0.015),
    )


def _looks(
    rng: np.random.Generator,
    forbidden: frozenset[tuple[Color, Shape]],
    required: tuple[Color, Shape] | None,
    duplicate_rate: float,
) -> list[_Look]:
    count = 1 + int(rng.choice(len(_COUNT_WEIGHTS), p=_COUNT_WEIGHTS))
    repeats = int(rng.integers(2, min(count, 3) + 1)) if count > 1 and rng.random() < duplicate_rate else 1
    kinds = count - repeats + 1

    allowed = [
        (color, shape)
        for color in COLORS
        for shape in SHAPES
        if (color, shape) not in forbidden and (color, shape) != required
    ]
    pairs = [allowed[i] for i in rng.permutation(len(allowed))[:kinds]]
    if required is not None:
        pairs[rng.integers(kinds)] = required
    looks = [
        _Look(
            shape=shape,
            color=color,
            size=SIZES[rng.integers(len(SIZES))],
            texture=TEXTURES[rng.choice(len(TEXTURES), p=_TEXTURE_WEIGHTS)],
        )
        for color, shape in pairs
    ]
    return [looks[0]] * (repeats - 1) + looks


def _placed(rng: np.random.Generator, looks: list[_Look]) -> tuple[Body, ...]:
    bodies: list[Body] = []
    while len(bodies) < len(looks):
        look = looks[len(bodies)]
        for _ in range(_PLACINGS_TRIED):
            z = rng.uniform(NEAREST, FARTHEST)
            reach = SPREAD * z - FRAME_MARGIN[look.size]
            body = Body(
                shape=look.shape,
                color=look.color,
                size=look.size,
                texture=look.texture,
                x=rng.uniform(-reach, reach),
                z=z,
                turn=rng.random(),
            )
            if all(_apart(body, other) for other in bodies):
                bodies.append(body)
                break
        else:
            bodies.clear()
    return tuple(bodies)


def _apart(one: Body, other: Body) -> bool:
    room = FOOTPRINT[one.size] + FOOTPRINT[other.size] + GAP
    x, z = one.x - other.x, one.z - other.z
    return x * x + z * z >= room * room


def _unit(x: float, y: float, z: float) -> tuple[float, float, float]:
    length = sqrt(x * x + y * y + z * z)
    return (x / length, y / length, z / length)
