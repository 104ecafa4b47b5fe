"""What rendered scenes teach an encoder: for every cell of its grid, which body is in front of it.

S side of the picture in px, H and W grid height and width, A attributes.
"""

import io
import multiprocessing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.scenes.dataset import LEAST_VISIBLE, jpeg
from pipeline.scenes.renderer import Rendering, render
from pipeline.scenes.scene import COLORS, SHAPES, SIZES, TEXTURES, Body, Color, Scene, Shape, draw_scene

Box = tuple[float, float, float, float]
Pair = tuple[Color, Shape]
Purpose = Literal["train", "test"]

_ALIKE = 0.35
"""Share of scenes with more than one body in which some are alike."""

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": COLORS,
    "size": SIZES,
    "texture": TEXTURES,
}
BACKGROUND = 0
"""Class of a cell without a body; the values of an attribute count from 1."""
IGNORE = -1
"""Class of a cell that bodies only graze, where neither answer would be wrong."""

_LEAST_COVER, _MOST_GRAZED = 0.25, 0.05
"""Shares of a cell from which on, and up to which, it counts as a body's or as empty."""
_STREAM: Mapping[Purpose, int] = {"train": 1, "test": 2}
"""Last word of a seed. The dataset seeds with three, so that none of its scenes is drawn here."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture, and what its cells show."""

    picture: npt.NDArray[np.uint8]
    """[S, S, 3], as it comes back from a JPEG file of the dataset's quality."""
    scene: Scene
    boxes: tuple[Box, ...]
    """Of what is visible of each body: left, top, width and height in px."""
    classes: npt.NDArray[np.int8]
    """[A, H, W]: `NOTHING`, `UNCOUNTED`, or 1 + the place of the body's value in `ATTRIBUTES`."""


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """What to draw lessons from."""

    seed: int
    size: int
    """S."""
    stride: int
    """Side of a cell in px; a divisor of `size`."""
    held_out: tuple[Pair, ...]
    """Pairs that no train lesson shows, and that every second test lesson does."""


def draw_lessons(syllabus: SamplingSpec, purpose: Purpose, count: int, workers: int) -> Iterator[Example]:
    """Draw and render lessons, in order, in `workers` processes; each depends on syllabus and place alone."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(partial(draw_lesson, syllabus, purpose), range(count), chunksize=8)


def draw_lesson(syllabus: SamplingSpec, purpose: Purpose, index: int) -> Example:
    """Draw and render one lesson."""
    rng = np.random.default_rng([syllabus.seed, index, 0, _STREAM[purpose]])
    asked = purpose == "test" and index % 2 == 1
    required = syllabus.held_out[index // 2 % len(syllabus.held_out)] if asked else None
    while True:
        scene = draw_scene(rng, forbidden=frozenset(syllabus.held_out), required=required, duplicate_rate=_ALIKE)
        rendering = render(scene, syllabus.size)
        if min(rendering.visible) >= LEAST_VISIBLE:
            break
    return Example(
        picture=_from_jpeg(rendering),
        scene=scene,
        boxes=rendering.boxes,
        classes=_classes(scene, rendering.boxes, syllabus),
    )


def classes_of(body: Body) -> list[int]:
    """Classes of a body, one for each of `ATTRIBUTES`."""
    return [1 + values.index(getattr(body, name)) for name, values in ATTRIBUTES.items()]


def center_cell(box: Box, stride: int) -> tuple[int, int]:
    """Row and column of the cell that the center of a box lies in."""
    left, top, width, height = box
    return int((top + height / 2) // stride), int((left + width / 2) // stride)


def _from_jpeg(rendering: Rendering) -> npt.NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(jpeg(rendering))))


def _classes(scene: Scene, boxes: tuple[Box, ...], syllabus: SamplingSpec) -> npt.NDArray[np.int8]:
    by_distance = sorted(range(len(boxes)), key=lambda number: -scene.bodies[number].z)
    shares = _shares(boxes, by_distance, syllabus)  # [bodies, H, W]
    front = np.where(shares.max(axis=0) >= _LEAST_COVER, shares.argmax(axis=0), -1)
    for number in by_distance:
        # A small body between four cells covers none of them well, but must be told somewhere.
        front[center_cell(boxes[number], syllabus.stride)] = number

    classes = np.full((len(ATTRIBUTES), *front.shape), IGNORE, dtype=np.int8)
    classes[:, (front < 0) & (shares.sum(axis=0) <= _MOST_GRAZED)] = BACKGROUND
    for number, body in enumerate(scene.bodies):
        classes[:, front == number] = np.array(classes_of(body))[:, None]
    return classes


def _shares(boxes: tuple[Box, ...], by_distance: list[int], syllabus: SamplingSpec) -> npt.NDArray[np.float64]:
    """Share of each cell that each body covers, [bodies, H, W], with the ellipse in its box for its outline."""
    owner = np.full((syllabus.size, syllabus.size), -1)
    centers = np.arange(syllabus.size) + 0.5
    for number in by_distance:
        left, top, width, height = boxes[number]
        across = (centers - left) / width * 2 - 1
        down = (centers - top) / height * 2 - 1
        owner[across[None, :] ** 2 + down[:, None] ** 2 < 1] = number
    side = syllabus.size // syllabus.stride
    cells = owner.reshape(side, syllabus.stride, side, syllabus.stride)
    return np.stack([(cells == number).mean(axis=(1, 3)) for number in range(len(boxes))])
