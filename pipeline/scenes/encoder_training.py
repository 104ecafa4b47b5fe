"""The embedded dataset's own encoder: a ResNet-18 up to `layer3`, taught by what rendered scenes show.

It stands in for ImageNet weights. Every cell of the grid learns to tell the body in front of it, or that there is
none, so that features say what is where: only then can attention be judged by where it lies.

N scenes, B scenes a batch, S side of the picture in px, H and W grid height and width, C channels, A attributes.
"""

import io
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pipeline.features.encoder import STRIDES, GridEncoder
from pipeline.features.images import Pixels, normalise
from pipeline.params import section
from pipeline.scenes.render import render
from pipeline.scenes.world import COLOURS, FLOORS, SHAPES, SIZES, TEXTURES, Body, Colour, Scene, Shape, draw_scene

ARCHITECTURE, LAYER = "resnet18", "layer3"
STRIDE = STRIDES[LAYER]

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "texture": TEXTURES,
}
NOTHING = 0
"""Class of a cell without a body; the values of an attribute follow."""
UNCOUNTED = -1
"""Class of a cell that a body only grazes: neither answer would be wrong."""


@section
class EncoderParams:
    seed: int
    images: Annotated[int, Field(ge=1)]
    images_a_batch: Annotated[int, Field(ge=1)]
    epochs: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    warm_up: Annotated[int, Field(ge=0)]
    nothing_weight: Annotated[float, Field(gt=0)]
    jitter: Annotated[float, Field(ge=0, lt=1)]
    test_images: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    picture: Pixels
    """uint8 [S, S, 3]."""
    scene: Scene
    boxes: tuple[tuple[float, float, float, float], ...]


def draw_lesson(
    seed: Sequence[int], size: int, forbidden: frozenset[tuple[Colour, Shape]], required: Any
) -> Lesson:
    rng = np.random.default_rng(seed)
    while True:
        scene = draw_scene(rng, forbidden=forbidden, required=required)
        r = render(scene, size)
        if min(r.visible) >= 0.55 and min(min(b[2:]) for b in r.boxes) >= 10:
            break
    file = io.BytesIO()
    Image.fromarray(r.image).save(file, "JPEG", quality=95, subsampling=0)
    return Lesson(picture=np.array(Image.open(file)), scene=scene, boxes=r.boxes)


def label(lesson: Lesson) -> npt.NDArray[np.int8]:
    """[A, H, W]"""
    size = lesson.picture.shape[0]
    side = size // STRIDE
    owner = np.full((size, size), -1)
    where = np.arange(size) + 0.5
    order = sorted(range(len(lesson.boxes)), key=lambda n: -lesson.scene.bodies[n].z)
    for n in order:
        left, top, width, height = lesson.boxes[n]
        x = (where - left) / width * 2 - 1
        y = (where - top) / height * 2 - 1
        owner[x[None, :] ** 2 + y[:, None] ** 2 < 1] = n
    cells = owner.reshape(side, STRIDE, side, STRIDE)
    shares = np.stack([(cells == n).mean((1, 3)) for n in range(len(order))])
    front = np.where(shares.max(0) >= 0.25, shares.argmax(0), -1)
    for n in order:
        front[centre_cell(lesson.boxes[n])] = n
    out = np.full((len(ATTRIBUTES), side, side), UNCOUNTED, np.int8)
    out[:, (shares.sum(0) < 0.05) & (front < 0)] = NOTHING
    for n, body in enumerate(lesson.scene.bodies):
        out[:, front == n] = np.array(classes(body))[:, None]
    return out


def centre_cell(box: tuple[float, float, float, float]) -> tuple[int, int]:
    left, top, width, height = box
    return int((top + height / 2) // STRIDE), int((left + width / 2) // STRIDE)


def classes(body: Body) -> list[int]:
    return [1 + values.index(getattr(body, name)) for name, values in ATTRIBUTES.items()]


class Heads(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cells = nn.Conv2d(channels, sum(1 + len(v) for v in ATTRIBUTES.values()), 1)
        self.floor = nn.Linear(channels, len(FLOORS))

    def forward(self, grids: Tensor) -> tuple[list[Tensor], Tensor]:
        answers = self.cells(grids).split([1 + len(v) for v in ATTRIBUTES.values()], dim=1)
        return list(answers), self.floor(grids.mean((2, 3)))


def objective(answers: list[Tensor], floor: Tensor, labels: Tensor, floors: Tensor, nothing_weight: float) -> Tensor:
    loss = F.cross_entropy(floor.float(), floors)
    for i, answer in enumerate(answers):
        weight = torch.ones(answer.shape[1])
        weight[NOTHING] = nothing_weight
        loss = loss + F.cross_entropy(answer.float(), labels[:, i], weight, ignore_index=UNCOUNTED)
    return loss
