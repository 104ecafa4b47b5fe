"""Scenes of the embedded dataset: the attributes of objects and floors, and random sampling of scenes.

World coordinates: the floor is the plane y = 0, x points right and z away from the camera. The unit of length is about
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
ColorShape = tuple[Color, Shape]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLORS: tuple[Color, ...] = get_args(Color)
SIZES: tuple[Size, ...] = get_args(Size)
TEXTURES: tuple[Texture, ...] = get_args(Texture)
FLOORS: tuple[Floor, ...] = get_args(Floor)

# An object is entirely inside the frame where MIN_Z <= z <= MAX_Z and |x| <= FRAME_SLOPE * z - FRAME_MARGIN[size].
MIN_Z, MAX_Z = 4.9, 9.2
FRAME_SLOPE = 0.27
FRAME_MARGIN: dict[Size, float] = {"small": 0.21, "large": 0.45}

FOOTPRINT_RADIUS: dict[Size, float] = {"small": 0.385, "large": 0.6}
"""Radius of a circle on the floor that contains any object of the size, whatever its yaw."""
MIN_GAP = 0.15
"""Minimum distance between the footprints of two objects."""

_NUM_OBJECTS_PROBABILITIES = (0.12, 0.33, 0.33, 0.22)
"""Probabilities of one to four objects."""
_TEXTURE_PROBABILITIES = (0.4, 0.2, 0.2, 0.2)
"""Probability of each of `TEXTURES`."""
_MAX_PLACEMENT_TRIES = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """An object that stands on the floor."""

    shape: Shape
    color: Color
    size: Size
    texture: Texture
    x: float
    z: float
    yaw: float
    """Rotation about the vertical axis, in turns (0 to 1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One to four objects on a floor, with a light and a camera."""

    objects: tuple[SceneObject, ...]
    floor: Floor
    tint: tuple[float, float, float]
    """Factors on the red, green and blue of the floor and the backdrop; they also rotate and shift its texture."""
    light_direction: tuple[float, float, float]
    """Unit vector towards the light; y > 0."""
    light_intensity: float
    """Factor on the light, about 1."""
    camera_height: float
    camera_pitch: float
    """Tangent of the camera's downward angle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Appearance:
    """Attributes of an object without its position; duplicates share them."""

    shape: Shape
    color: Color
    size: Size
    texture: Texture


def sample_scene(
    rng: np.random.Generator,
    *,
    forbidden: frozenset[ColorShape],
    required: ColorShape | None,
    duplicate_rate: float,
) -> Scene:
    """Sample a scene at random.

    Objects neither overlap nor leave the frame. Two objects of the same color and shape also have the same size and
    texture. Sampling uses exact arithmetic only, so a generator state gives the same scene on every machine.

    Args:
        rng: Random generator; it advances.
        forbidden: Pairs of color and shape that no object has. At least four pairs must remain allowed.
        required: Pair that at least one object has, even if it is forbidden; None requires no pair.
        duplicate_rate: Probability that a scene with more than one object contains identical objects.
    """
    camera_height = rng.uniform(2.2, 3.2)
    return Scene(
        objects=_place_objects(rng, _sample_appearances(rng, forbidden, required, duplicate_rate)),
        floor=FLOORS[rng.integers(len(FLOORS))],
        tint=(rng.uniform(0.88, 1.12), rng.uniform(0.88, 1.12), rng.uniform(0.88, 1.12)),
        light_direction=_normalize(rng.uniform(-0.7, 0.7), 1.0, rng.uniform(-0.9, -0.2)),
        light_intensity=rng.uniform(0.85, 1.15),
        camera_height=camera_height,
        # The camera points about 0.4 above the center of the floor (z = 7).
        camera_pitch=(camera_height - 0.4) / 7 + rng.uniform(-0.015, 0.015),
    )


def _sample_appearances(
    rng: np.random.Generator,
    forbidden: frozenset[ColorShape],
    required: ColorShape | None,
    duplicate_rate: float,
) -> list[_Appearance]:
    num_objects = 1 + int(rng.choice(len(_NUM_OBJECTS_PROBABILITIES), p=_NUM_OBJECTS_PROBABILITIES))
    num_identical = 1
    if num_objects > 1 and rng.random() < duplicate_rate:
        num_identical = int(rng.integers(2, min(num_objects, 3) + 1))
    num_distinct = num_objects - num_identical + 1

    allowed = [
        (color, shape)
        for color in COLORS
        for shape in SHAPES
        if (color, shape) not in forbidden and (color, shape) != required
    ]
    pairs = [allowed[i] for i in rng.permutation(len(allowed))[:num_distinct]]
    if required is not None:
        pairs[rng.integers(num_distinct)] = required
    appearances = [
        _Appearance(
            shape=shape,
            color=color,
            size=SIZES[rng.integers(len(SIZES))],
            texture=TEXTURES[rng.choice(len(TEXTURES), p=_TEXTURE_PROBABILITIES)],
        )
        for color, shape in pairs
    ]
    return [appearances[0]] * (num_identical - 1) + appearances


def _place_objects(rng: np.random.Generator, appearances: list[_Appearance]) -> tuple[SceneObject, ...]:
    """Place the objects one after another by rejection sampling; start over if one does not fit."""
    objects: list[SceneObject] = []
    while len(objects) < len(appearances):
        appearance = appearances[len(objects)]
        for _ in range(_MAX_PLACEMENT_TRIES):
            z = rng.uniform(MIN_Z, MAX_Z)
            max_x = FRAME_SLOPE * z - FRAME_MARGIN[appearance.size]
            candidate = SceneObject(
                shape=appearance.shape,
                color=appearance.color,
                size=appearance.size,
                texture=appearance.texture,
                x=rng.uniform(-max_x, max_x),
                z=z,
                yaw=rng.random(),
            )
            if all(_are_apart(candidate, placed) for placed in objects):
                objects.append(candidate)
                break
        else:
            objects.clear()
    return tuple(objects)


def _are_apart(a: SceneObject, b: SceneObject) -> bool:
    min_distance = FOOTPRINT_RADIUS[a.size] + FOOTPRINT_RADIUS[b.size] + MIN_GAP
    x, z = a.x - b.x, a.z - b.z
    return x * x + z * z >= min_distance * min_distance


def _normalize(x: float, y: float, z: float) -> tuple[float, float, float]:
    length = sqrt(x * x + y * y + z * z)
    return (x / length, y / length, z / length)
