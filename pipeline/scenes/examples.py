"""Training examples of the scene encoder: rendered scenes with a label for every cell of the feature grid.

S side of the image in px, H and W height and width of the grid, A attributes, N objects of the scene.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.scenes.dataset import MIN_VISIBILITY, encode_jpeg, start_pool
from pipeline.scenes.renderer import Box, render
from pipeline.scenes.scene import (
    COLORS,
    SHAPES,
    SIZES,
    TEXTURES,
    ColorShape,
    Scene,
    SceneObject,
    sample_scene,
)

ExampleSplit = Literal["train", "test"]

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": COLORS,
    "size": SIZES,
    "texture": TEXTURES,
}
"""Values of each attribute. The label of a value is 1 + its index."""
BACKGROUND = 0
"""Label of a cell without an object."""
IGNORE = -1
"""Label of a cell that shows too little of an object to count as object or background; the loss ignores it."""

_DUPLICATE_RATE = 0.35
_MIN_OBJECT_COVERAGE = 0.25
"""A cell gets the label of an object that covers at least this fraction of it."""
_MAX_BACKGROUND_COVERAGE = 0.05
"""A cell of which objects cover at most this fraction is background."""
_SEED_SUFFIX: Mapping[ExampleSplit, int] = {"train": 1, "test": 2}
"""Last of the four integers that seed an example. Images of the dataset are seeded by three, so none is an example."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image with labels."""

    image: npt.NDArray[np.uint8]
    """RGB [S, S, 3], encoded and decoded with the dataset's JPEG settings."""
    scene: Scene
    boxes: tuple[Box, ...]
    """Bounding box of the visible part of each object."""
    labels: npt.NDArray[np.int8]
    """[A, H, W]: 1 + index of the object's value in `ATTRIBUTES`, `BACKGROUND` or `IGNORE`."""


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """Parameters that determine the sampled examples."""

    seed: int
    image_size: int
    """Side of the images, S, in px."""
    stride: int
    """Side of a grid cell in px; a divisor of `image_size`."""
    held_out: tuple[ColorShape, ...]
    """Pairs of color and shape that occur in no train example and in every second test example."""


def sample_examples(spec: SamplingSpec, split: ExampleSplit, num_examples: int, num_workers: int) -> Iterator[Example]:
    """Sample examples in parallel; each depends on `spec`, `split` and its index alone.

    Args:
        spec: Parameters of the examples.
        split: `train` or `test`.
        num_examples: Number of examples.
        num_workers: Number of processes.

    Yields:
        The examples in order of index.
    """
    with start_pool(num_workers) as pool:
        yield from pool.imap(partial(sample_example, spec, split), range(num_examples), chunksize=8)


def sample_example(spec: SamplingSpec, split: ExampleSplit, index: int) -> Example:
    """Sample the example with an index; see `sample_examples`."""
    rng = np.random.default_rng([spec.seed, index, 0, _SEED_SUFFIX[split]])
    is_held_out = split == "test" and index % 2 == 1
    required = spec.held_out[index // 2 % len(spec.held_out)] if is_held_out else None
    while True:
        scene = sample_scene(rng, forbidden=frozenset(spec.held_out), required=required, duplicate_rate=_DUPLICATE_RATE)
        rendering = render(scene, spec.image_size)
        if min(rendering.visibility) >= MIN_VISIBILITY:
            break
    return Example(
        image=np.array(Image.open(io.BytesIO(encode_jpeg(rendering)))),
        scene=scene,
        boxes=rendering.boxes,
        labels=_label_cells(scene.objects, rendering.boxes, spec),
    )


def object_labels(obj: SceneObject) -> list[int]:
    """Return the label of each of the `ATTRIBUTES` of an object."""
    return [1 + values.index(getattr(obj, name)) for name, values in ATTRIBUTES.items()]


def center_cell(box: Box, stride: int) -> tuple[int, int]:
    """Return row and column of the cell that contains the center of a box."""
    left, top, width, height = box
    return int((top + height / 2) // stride), int((left + width / 2) // stride)


def _label_cells(objects: Sequence[SceneObject], boxes: Sequence[Box], spec: SamplingSpec) -> npt.NDArray[np.int8]:
    """Label every cell with the object in it: [A, H, W]."""
    far_to_near = sorted(range(len(boxes)), key=lambda index: -objects[index].z)
    coverage = _cell_coverage(boxes, far_to_near, spec)  # [N, H, W]
    # Index of the object in each cell, -1 for none.
    object_index = np.where(coverage.max(axis=0) >= _MIN_OBJECT_COVERAGE, coverage.argmax(axis=0), -1)  # [H, W]
    for index in far_to_near:
        # A small object on the border of four cells covers little of each, but needs a label in one of them.
        object_index[center_cell(boxes[index], spec.stride)] = index

    labels = np.full((len(ATTRIBUTES), *object_index.shape), IGNORE, dtype=np.int8)  # [A, H, W]
    labels[:, (object_index < 0) & (coverage.sum(axis=0) <= _MAX_BACKGROUND_COVERAGE)] = BACKGROUND
    for index, obj in enumerate(objects):
        labels[:, object_index == index] = np.array(object_labels(obj))[:, None]
    return labels


def _cell_coverage(boxes: Sequence[Box], far_to_near: Sequence[int], spec: SamplingSpec) -> npt.NDArray[np.float64]:
    """Return the fraction of each cell that each object covers, [N, H, W]; ellipses approximate the silhouettes."""
    object_index = np.full((spec.image_size, spec.image_size), -1)  # [S, S]
    pixel_centers = np.arange(spec.image_size) + 0.5
    for index in far_to_near:
        left, top, width, height = boxes[index]
        x = (pixel_centers - left) / width * 2 - 1
        y = (pixel_centers - top) / height * 2 - 1
        object_index[x[None, :] ** 2 + y[:, None] ** 2 < 1] = index
    side = spec.image_size // spec.stride
    cells = object_index.reshape(side, spec.stride, side, spec.stride)
    return np.stack([(cells == index).mean(axis=(1, 3)) for index in range(len(boxes))])
