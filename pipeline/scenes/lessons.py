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
from pipeline.scenes.render import Rendering, render
from pipeline.scenes.world import COLOURS, SHAPES, SIZES, TEXTURES, Body, Colour, Scene, Shape, draw_scene

Box = tuple[float, float, float, float]
Pair = tuple[Colour, Shape]
Purpose = Literal["train", "test"]

_ALIKE = 0.35
"""Share of scenes with more than one body in which some are alike."""

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "texture": TEXTURES,
}
NOTHING = 0
"""Class of a cell without a body; the values of an attribute count from 1."""
UNCOUNTED = -1
"""Class of a cell that bodies only graze, where neither answer would be wrong."""

_LEAST_COVER, _MOST_GRAZED = 0.25, 0.05
"""Shares of a cell from which on, and up to which, it counts as a body's or as empty."""
_STREAM: Mapping[Purpose, int] = {"train": 1, "test": 2}
"""Last word of a seed. The dataset seeds with three, so that none of its scenes is drawn here."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A picture, and what its cells show."""

    picture: npt.NDArray[np.uint8]
    """[S, S, 3], as it comes back from a JPEG file of the dataset's quality."""
    scene: Scene
    boxes: tuple[Box, ...]
    """Of what is visible of each body: left, top, width and height in px."""
    classes: npt.NDArray[np.int8]
    """[A, H, W]: `NOTHING`, `UNCOUNTED`, or 1 + the place of the body's value in `ATTRIBUTES`."""


@dataclass(frozen=True, kw_only=True)
class Syllabus:
    """What to draw lessons from."""

    seed: int
    size: int
    """S."""
    stride: int
    """Side of a cell in px; a divisor of `size`."""
    held_out: tuple[Pair, ...]
    """Pairs that no train lesson shows, and that every second test lesson does."""


def draw_lessons(syllabus: Syllabus, purpose: Purpose, count: int, workers: int) -> Iterator[Lesson]:
    """Draw and render lessons, in order, in `workers` processes; each depends on syllabus and place alone."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(partial(draw_lesson, syllabus, purpose), range(count), chunksize=8)


def draw_lesson(syllabus: Syllabus, purpose: Purpose, index: int) -> Lesson:
    """Draw and render one lesson."""
    rng = np.random.default_rng([syllabus.seed, index, 0, _STREAM[purpose]])
    asked = purpose == "test" and index % 2 == 1
    required = syllabus.held_out[index // 2 % len(syllabus.held_out)] if asked else None
    while True:
        scene = draw_scene(rng, forbidden=frozenset(syllabus.held_out), required=required, alike=_ALIKE)
        rendering = render(scene, syllabus.size)
        if min(rendering.visible) >= LEAST_VISIBLE:
            break
    return Lesson(
        picture=_from_jpeg(rendering),
        scene=scene,
        boxes=rendering.boxes,
        classes=_classes(scene, rendering.boxes, syllabus),
    )


def classes_of(body: Body) -> list[int]:
    """Classes of a body, one for each of `ATTRIBUTES`."""
    return [1 + values.index(getattr(body, name)) for name, values in ATTRIBUTES.items()]


def centre_cell(box: Box, stride: int) -> tuple[int, int]:
    """Row and column of the cell that the centre of a box lies in."""
    left, top, width, height = box
    return int((top + height / 2) // stride), int((left + width / 2) // stride)


def _from_jpeg(rendering: Rendering) -> npt.NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(jpeg(rendering))))


def _classes(scene: Scene, boxes: tuple[Box, ...], syllabus: Syllabus) -> npt.NDArray[np.int8]:
    by_distance = sorted(range(len(boxes)), key=lambda number: -scene.bodies[number].z)
    shares = _shares(boxes, by_distance, syllabus)  # [bodies, H, W]
    front = np.where(shares.max(axis=0) >= _LEAST_COVER, shares.argmax(axis=0), -1)
    for number in by_distance:
        # A small body between four cells covers none of them well, but must be told somewhere.
        front[centre_cell(boxes[number], syllabus.stride)] = number

    classes = np.full((len(ATTRIBUTES), *front.shape), UNCOUNTED, dtype=np.int8)
    classes[:, (front < 0) & (shares.sum(axis=0) <= _MOST_GRAZED)] = NOTHING
    for number, body in enumerate(scene.bodies):
        classes[:, front == number] = np.array(classes_of(body))[:, None]
    return classes


def _shares(boxes: tuple[Box, ...], by_distance: list[int], syllabus: Syllabus) -> npt.NDArray[np.float64]:
    """Share of each cell that each body covers, [bodies, H, W], with the ellipse in its box for its outline."""
    owner = np.full((syllabus.size, syllabus.size), -1)
    centres = np.arange(syllabus.size) + 0.5
    for number in by_distance:
        left, top, width, height = boxes[number]
        across = (centres - left) / width * 2 - 1
        down = (centres - top) / height * 2 - 1
        owner[across[None, :] ** 2 + down[:, None] ** 2 < 1] = number
    side = syllabus.size // syllabus.stride
    cells = owner.reshape(side, syllabus.stride, side, syllabus.stride)
    return np.stack([(cells == number).mean(axis=(1, 3)) for number in range(len(boxes))])
