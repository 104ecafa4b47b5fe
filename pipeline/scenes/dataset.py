"""The embedded dataset on disk: pictures of random scenes with five captions each, in COCO's caption format.

    images/train_00000.jpg ...    JPEG, quality 95, colors at full resolution
    captions_train.json, captions_val.json, captions_test.json

Beyond COCO's keys an image has `things` (what it shows, boxes in pixels) and `subset`. Some pairs of color and
shape are held out: no picture of train or val shows one. Every third picture of test does ("held-out", against
"seen"), so that a captioner can be asked for a combination that it never saw.
"""

import io
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field
from tqdm import tqdm

from pipeline.artifacts import fingerprint, publish, work_folder, write_atomically, write_json
from pipeline.captions.records import SPLITS, Split
from pipeline.import_graph import code_digest
from pipeline.params import params_section, to_plain
from pipeline.scenes.caption_templates import captions
from pipeline.scenes.renderer import Rendering, render
from pipeline.scenes.scene import Color, Scene, Shape, draw_scene

STAGE = "render"

LEAST_VISIBLE = 0.55
"""Share of every body that must show."""
_LEAST_SIDE = 10 / 128
"""Of a box, as a fraction of the picture's side."""
_HELD_OUT_EVERY = 3
_IDS_A_SPLIT = 1_000_000
_MOST_PAIRS_TAKEN = 2


@params_section
class RenderParams:
    """What the dataset holds."""

    seed: Annotated[int, Field(ge=0)]
    """Start of all random draws: another seed, other pictures."""
    size: Annotated[int, Field(ge=32, le=1024)]
    """Side of the square pictures in pixels; time grows with its square."""
    train: Annotated[int, Field(ge=1, le=_IDS_A_SPLIT)]
    """Pictures to train on."""
    val: Annotated[int, Field(ge=1, le=_IDS_A_SPLIT)]
    """Pictures to choose the best epoch by."""
    test: Annotated[int, Field(ge=1, le=_IDS_A_SPLIT)]
    """Pictures to score; every third shows a held-out pair."""
    duplicate_rate: Annotated[float, Field(ge=0, le=1)]
    """Share of the pictures with more than one thing in which some are alike, and captions count them."""
    held_out: Annotated[tuple[tuple[Color, Shape], ...], Field(min_length=1)]
    """Pairs of color and shape that train and val never show; each color and shape keeps other pairs."""

    def __post_init__(self) -> None:
        """Check that train can still teach every color and every shape."""
        for (color, shape), times in Counter(self.held_out).items():
            if times > 1:
                raise ValueError(f"held_out must name a pair once, got {times} times {color} {shape}")
        for word, taken in Counter(word for pair in self.held_out for word in pair).items():
            if taken > _MOST_PAIRS_TAKEN:
                raise ValueError(
                    f"held_out must leave train most pairs of a word: at most {_MOST_PAIRS_TAKEN} may have "
                    f"'{word}', got {taken}"
                )


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One picture to make, which depends on nothing but this."""

    split: Split
    index: int

    @property
    def name(self) -> str:
        return f"{self.split}_{self.index:05d}"

    @property
    def image_id(self) -> int:
        return (SPLITS.index(self.split) + 1) * _IDS_A_SPLIT + self.index


@dataclass(frozen=True, kw_only=True)
class _Made:
    """One picture and what is known of it."""

    task: _Task
    jpeg: bytes
    facts: dict[str, Any]
    """Its entry under `images`, and its `captions`."""


def write_dataset(params: RenderParams, out: Path, work: Path, workers: int) -> None:
    """Draw, render and word the dataset and publish it as the folder `out`.

    The bytes depend on `params` alone, not on `workers` (processes). Pictures that an earlier, killed run of the
    same params and code finished are kept in `work` and not made again.
    """
    tasks = [_Task(split=split, index=index) for split in SPLITS for index in range(getattr(params, split))]
    with work_folder(work, STAGE, fingerprint(params=to_plain(params), code=code_digest(__name__))) as folder:
        dataset, facts = folder / "dataset", folder / "facts"
        missing = [task for task in tasks if not (facts / f"{task.name}.json").is_file()]
        with tqdm(total=len(tasks), initial=len(tasks) - len(missing), unit="image", desc=STAGE) as progress:
            for made in _make_all(params, missing, workers):
                write_atomically(dataset / "images" / f"{made.task.name}.jpg", made.jpeg)
                # Last, since it tells that the picture stands.
                write_json(facts / f"{made.task.name}.json", made.facts)
                progress.update()
        for split in SPLITS:
            names = [task.name for task in tasks if task.split == split]
            known = [json.loads((facts / f"{name}.json").read_text()) for name in names]
            write_json(dataset / f"captions_{split}.json", _coco_file(split, known))
        publish(dataset, out)


def _make_all(params: RenderParams, tasks: list[_Task], workers: int) -> Iterator[_Made]:
    if not tasks:
        return
    # Workers only compute: were they to write, those that outlive a killed parent would meet its successor's.
    with multiprocessing.get_context("spawn").Pool(min(workers, len(tasks))) as pool:
        yield from pool.imap_unordered(partial(_make, params), tasks, chunksize=4)


def _make(params: RenderParams, task: _Task) -> _Made:
    rng = np.random.default_rng([params.seed, SPLITS.index(task.split), task.index])
    held_out = frozenset(params.held_out)
    asked = task.split == "test" and task.index % _HELD_OUT_EVERY == 0
    required = params.held_out[task.index // _HELD_OUT_EVERY % len(params.held_out)] if asked else None
    while True:
        scene = draw_scene(rng, forbidden=held_out, required=required, duplicate_rate=params.duplicate_rate)
        rendering = render(scene, params.size)
        if _clear(rendering, params.size):
            break

    across = [(left + width / 2) / params.size for left, _, width, _ in rendering.boxes]
    facts = {
        "image": {
            "id": task.image_id,
            "file_name": f"{task.name}.jpg",
            "width": params.size,
            "height": params.size,
            "subset": {"test": "held-out" if asked else "seen"}.get(task.split),
            "objects": _things(scene, rendering),
        },
        "captions": captions(scene, rng, across),
    }
    return _Made(task=task, jpeg=jpeg(rendering), facts=facts)


def _clear(rendering: Rendering, size: int) -> bool:
    """Whether a person could name every body."""
    return min(rendering.visible) >= LEAST_VISIBLE and all(
        min(width, height) >= _LEAST_SIDE * size for _, _, width, height in rendering.boxes
    )


def _things(scene: Scene, rendering: Rendering) -> list[dict[str, Any]]:
    return [
        {
            "attributes": {
                "shape": body.shape,
                "color": body.color,
                "size": body.size,
                "texture": body.texture,
            },
            "box": box,
        }
        for body, box in zip(scene.bodies, rendering.boxes, strict=True)
    ]


def jpeg(rendering: Rendering) -> bytes:
    """Store a picture as the dataset stores it."""
    file = io.BytesIO()
    Image.fromarray(rendering.image).save(file, "JPEG", quality=95, subsampling="4:4:4")
    return file.getvalue()


def _coco_file(split: Split, known: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "info": {"description": f"Rendered scenes, {split}", "version": "1.0"},
        "licenses": [],
        "images": [one["image"] for one in known],
        "annotations": [
            {"id": 10 * one["image"]["id"] + number, "image_id": one["image"]["id"], "caption": caption}
            for one in known
            for number, caption in enumerate(one["captions"])
        ],
    }
