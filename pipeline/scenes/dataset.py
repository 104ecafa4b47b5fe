"""The embedded dataset: images of random scenes with five captions each, in COCO's caption format.

    images/train_00000.jpg ...    JPEG, quality 95, no chroma subsampling
    captions_train.json, captions_val.json, captions_test.json

Beyond COCO's keys, each entry of `images` has `objects` (attributes, and bounding boxes in pixels) and `subset`. Some
pairs of color and shape are held out: no object of train or val has one. Every third test image contains one (subset
`held-out`; the others are `seen`), to measure compositional generalization.
"""

import io
import logging
import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field, FiniteFloat
from tqdm import tqdm
from typing_extensions import TypedDict

from pipeline.artifacts import Int64, fingerprint, read_json, work_folder, write_atomically, write_json
from pipeline.captions.records import SPLITS, Split
from pipeline.errors import UserError
from pipeline.import_graph import code_digest
from pipeline.params import params_section, to_plain
from pipeline.scenes.caption_templates import sample_captions
from pipeline.scenes.renderer import Rendering, render
from pipeline.scenes.scene import ColorShape, Scene, sample_scene

logger = logging.getLogger("gridcap")

STAGE = "render"

MIN_VISIBILITY = 0.55
"""Minimum visible fraction of every object."""
_MIN_BOX_SIDE = 10 / 128
"""Minimum side of a bounding box, as a fraction of the image's side."""
_HELD_OUT_INTERVAL = 3
_MAX_IMAGES_PER_SPLIT = 1_000_000
_MAX_HELD_OUT_PER_VALUE = 2
_NUM_WRITERS = 8
"""Threads that write images. They wait for the disk, which syncs several files in the time of one."""


@params_section
class RenderParams:
    """Section `render`: contents of the embedded dataset."""

    seed: Annotated[int, Field(ge=0)]
    """Seed of scenes and captions."""
    image_size: Annotated[int, Field(ge=32, le=1024)]
    """Side of the square images, in pixels."""
    num_train: Annotated[int, Field(ge=1, le=_MAX_IMAGES_PER_SPLIT)]
    """Number of train images."""
    num_val: Annotated[int, Field(ge=1, le=_MAX_IMAGES_PER_SPLIT)]
    """Number of validation images."""
    num_test: Annotated[int, Field(ge=1, le=_MAX_IMAGES_PER_SPLIT)]
    """Number of test images; every third contains a held-out pair."""
    duplicate_rate: Annotated[float, Field(ge=0, le=1)]
    """Fraction of the multi-object scenes that contain identical objects, which captions count."""
    held_out: Annotated[tuple[ColorShape, ...], Field(min_length=1)]
    """Pairs of color and shape that occur in test only; at most two per color and per shape."""

    def __post_init__(self) -> None:
        """Check that most combinations of every color and of every shape remain in train."""
        for (color, shape), count in Counter(self.held_out).items():
            if count > 1:
                raise ValueError(f"held_out must list each pair once, got {color} {shape} {count} times")
        for value, count in Counter(value for pair in self.held_out for value in pair).items():
            if count > _MAX_HELD_OUT_PER_VALUE:
                raise ValueError(
                    f"held_out must have at most {_MAX_HELD_OUT_PER_VALUE} pairs per color and per shape, got {count}"
                    f" with {value}"
                )

    def num_images(self, split: Split) -> int:
        """Return the number of images of a split."""
        return {"train": self.num_train, "val": self.num_val, "test": self.num_test}[split]


@dataclass(frozen=True, kw_only=True)
class _ImageKey:
    """Identifies an image of the dataset. With the params, it determines the image and its captions."""

    split: Split
    index: int

    @property
    def name(self) -> str:
        return f"{self.split}_{self.index:05d}"

    @property
    def image_id(self) -> int:
        return (SPLITS.index(self.split) + 1) * _MAX_IMAGES_PER_SPLIT + self.index


class _ObjectEntry(TypedDict):
    attributes: dict[str, str]
    box: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]


class _ImageEntry(TypedDict):
    """An entry under `images` of a caption file."""

    id: Int64
    file_name: str
    width: Int64
    height: Int64
    subset: str | None
    objects: list[_ObjectEntry]


class _Annotation(TypedDict):
    """Annotation of one image, as the work folder holds it."""

    image: _ImageEntry
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _AnnotatedImage:
    """An image of the dataset with its annotation."""

    key: _ImageKey
    jpeg: bytes
    annotation: _Annotation


@contextmanager
def write_dataset(params: RenderParams, work: Path, num_workers: int) -> Iterator[Path]:
    """Render the dataset. The lock of the work folder is held while the caller publishes the dataset.

    Images that an interrupted run with the same params and code finished are reused.

    Args:
        params: Contents of the dataset; they alone determine its bytes.
        work: Folder of unfinished work, kept between runs.
        num_workers: Number of rendering processes.

    Yields:
        The finished dataset folder, inside the work folder.
    """
    keys = [_ImageKey(split=split, index=index) for split in SPLITS for index in range(params.num_images(split))]
    with work_folder(work, STAGE, fingerprint(params=to_plain(params), code=code_digest(__name__))) as folder:
        dataset, annotations = folder / "dataset", folder / "annotations"
        finished = {key: _read_finished(dataset, annotations, key) for key in keys}
        missing = [key for key, annotation in finished.items() if annotation is None]
        with tqdm(total=len(keys), initial=len(keys) - len(missing), unit="image", desc=STAGE) as progress:
            write = partial(_write_image, dataset, annotations)
            for image in _write_concurrently(write, _generate_images(params, missing, num_workers)):
                finished[image.key] = image.annotation
                progress.update()
        for split in SPLITS:
            entries = [entry for key, entry in finished.items() if key.split == split and entry is not None]
            write_json(dataset / f"captions_{split}.json", _to_coco(split, entries))
        yield dataset


def _write_image(dataset: Path, annotations: Path, image: _AnnotatedImage) -> _AnnotatedImage:
    write_atomically(dataset / "images" / f"{image.key.name}.jpg", image.jpeg)
    # The annotation is written last: it marks the image as finished.
    write_json(annotations / f"{image.key.name}.json", image.annotation)
    return image


def _write_concurrently(
    write: Callable[[_AnnotatedImage], _AnnotatedImage], images: Iterator[_AnnotatedImage]
) -> Iterator[_AnnotatedImage]:
    """Write images on several threads, and yield each after it is written."""
    pending: deque[Future[_AnnotatedImage]] = deque()
    with ThreadPoolExecutor(_NUM_WRITERS) as writers:
        for image in images:
            pending.append(writers.submit(write, image))
            if len(pending) > _NUM_WRITERS:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def _read_finished(dataset: Path, annotations: Path, key: _ImageKey) -> _Annotation | None:
    """Read the annotation of an image that an earlier run finished; None if the image is missing or damaged."""
    path = annotations / f"{key.name}.json"
    if not (path.is_file() and (dataset / "images" / f"{key.name}.jpg").is_file()):
        return None
    try:
        annotation = read_json(path, _Annotation, "The image is rendered again.")
    except UserError as error:
        logger.warning("%s: %s", STAGE, error)
        return None
    return annotation if annotation["image"]["id"] == key.image_id else None


def encode_jpeg(rendering: Rendering) -> bytes:
    """Encode an image as JPEG, with the dataset's settings."""
    file = io.BytesIO()
    Image.fromarray(rendering.image).save(file, "JPEG", quality=95, subsampling="4:4:4")
    return file.getvalue()


def _generate_images(params: RenderParams, keys: list[_ImageKey], num_workers: int) -> Iterator[_AnnotatedImage]:
    if not keys:
        return
    # Only the parent writes files: a worker that outlives a killed parent must not write to the next run's folder.
    with start_pool(min(num_workers, len(keys))) as pool:
        yield from pool.imap_unordered(partial(_generate_image, params), keys, chunksize=4)


def start_pool(num_workers: int) -> Pool:
    """Start a pool of spawned processes that never receive SIGINT, which a terminal sends to all of them."""
    # The first use of a pool starts this process, which would unblock the signal.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return multiprocessing.get_context("spawn").Pool(num_workers, _keep_freed_memory)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _keep_freed_memory() -> None:
    """Let this process keep the memory that it frees after an image for the next one.

    glibc returns free memory to the system when it exceeds twice the size of the largest array so far, at most 64 MiB.
    Page faults would take a tenth of the time.
    """
    np.empty(30 << 20, dtype=np.uint8)


def _generate_image(params: RenderParams, key: _ImageKey) -> _AnnotatedImage:
    rng = np.random.default_rng([params.seed, SPLITS.index(key.split), key.index])
    is_held_out = key.split == "test" and key.index % _HELD_OUT_INTERVAL == 0
    required = params.held_out[key.index // _HELD_OUT_INTERVAL % len(params.held_out)] if is_held_out else None
    while True:
        scene = sample_scene(
            rng, forbidden=frozenset(params.held_out), required=required, duplicate_rate=params.duplicate_rate
        )
        rendering = render(scene, params.image_size)
        if _is_recognizable(rendering, params.image_size):
            break

    center_x = [(left + width / 2) / params.image_size for left, _, width, _ in rendering.boxes]
    annotation: _Annotation = {
        "image": {
            "id": key.image_id,
            "file_name": f"{key.name}.jpg",
            "width": params.image_size,
            "height": params.image_size,
            "subset": {"test": "held-out" if is_held_out else "seen"}.get(key.split),
            "objects": _object_annotations(scene, rendering),
        },
        "captions": sample_captions(scene, rng, center_x),
    }
    return _AnnotatedImage(key=key, jpeg=encode_jpeg(rendering), annotation=annotation)


def _is_recognizable(rendering: Rendering, image_size: int) -> bool:
    """Whether every object is visible and large enough for a person to name it."""
    return min(rendering.visibility) >= MIN_VISIBILITY and all(
        min(width, height) >= _MIN_BOX_SIDE * image_size for _, _, width, height in rendering.boxes
    )


def _object_annotations(scene: Scene, rendering: Rendering) -> list[_ObjectEntry]:
    return [
        {
            "attributes": {"shape": obj.shape, "color": obj.color, "size": obj.size, "texture": obj.texture},
            "box": box,
        }
        for obj, box in zip(scene.objects, rendering.boxes, strict=True)
    ]


def _to_coco(split: Split, annotations: list[_Annotation]) -> dict[str, Any]:
    return {
        "info": {"description": f"Rendered scenes, {split}", "version": "1.0"},
        "licenses": [],
        "images": [annotation["image"] for annotation in annotations],
        "annotations": [
            {"id": 10 * annotation["image"]["id"] + i, "image_id": annotation["image"]["id"], "caption": caption}
            for annotation in annotations
            for i, caption in enumerate(annotation["captions"])
        ],
    }
