"""The example images of the report: images with the best captions, with the worst captions, and random images."""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.captions.records import Record
from pipeline.evaluation.evaluate import EvaluationData, ReportParams
from pipeline.evaluation.scene_scores import find_grounded_words
from pipeline.features.images import Pixels, read_visible, upright_size
from pipeline.metrics.caption_scores import MetricTables
from pipeline.metrics.grounding import Box

ExampleGroup = Literal["best", "worst", "random"]

MAX_SIDE = 448
"""Maximum side of an image in the report, px."""
MAX_THUMBNAIL_SIDE = 96
"""Maximum side of an image in the tables of words, px."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image with its caption, as the report shows it."""

    image_id: int
    group: ExampleGroup
    """Why the image was selected."""
    image: Pixels
    """uint8 RGB [H, W, 3], upright: the part that the grid covers."""
    words: tuple[str, ...]
    """The generated caption, T words."""
    language: str
    """Code of the language of the captions."""
    trained_words: tuple[str, ...] | None
    """The caption before refinement; None if the model is not refined."""
    attention: NDArray[np.floating]
    """[T, h, w] attention weights of each word."""
    references: tuple[str, ...]
    """Untokenized reference captions."""
    scores: Mapping[str, float]
    """Scores of this caption, by metric."""
    boxes: Mapping[int, Sequence[Box]]
    """Boxes of the objects that a word refers to, by index of the word; empty without annotated objects."""


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A small image with its caption, for the tables of words."""

    image: Pixels
    """uint8 RGB [H, W, 3], upright."""
    words: tuple[str, ...]
    """The generated caption."""


def select_images(quality: Mapping[int, float], params: ReportParams, seed: int) -> list[tuple[ExampleGroup, int]]:
    """Select the images of the report, each at most once.

    If there are too few images, later groups have fewer.

    Args:
        quality: Score of each image, by image id. Of equal scores, the lower id is first.
        params: Number of images in each group.
        seed: Seed of the random images.

    Returns:
        Group and id of each image: the best images (best first), the worst (worst first), then random images.
    """
    ranked = sorted(quality, key=lambda image_id: (-quality[image_id], image_id))
    best = ranked[: params.best]
    ascending = sorted(ranked[params.best :], key=lambda image_id: (quality[image_id], image_id))
    worst, remaining = ascending[: params.worst], sorted(ascending[params.worst :])
    sample = random.Random(seed).sample(remaining, min(params.random, len(remaining)))
    groups: list[tuple[ExampleGroup, list[int]]] = [("best", best), ("worst", worst), ("random", sample)]
    return [(group, image_id) for group, image_ids in groups for image_id in image_ids]


def build_examples(data: EvaluationData, metrics: MetricTables, params: ReportParams, seed: int) -> list[Example]:
    """Select images by CIDEr-D and build their examples.

    Args:
        data: Artifacts of the split.
        metrics: Scores of each image.
        params: Number of images in each group.
        seed: Seed of the random images.

    Returns:
        The examples, in the order of `select_images`.

    Raises:
        UserError: An image is unreadable.
    """
    records = {record.image_id: record for record in data.records}
    rows = {image_id: row for row, image_id in enumerate(metrics.image_ids)}
    # CIDEr-D is not defined for one image, whose rank is known without it.
    scores = metrics.image_scores.get("CIDEr-D", metrics.image_scores["ROUGE-L"])
    quality = {image_id: float(scores[row]) for image_id, row in rows.items()}
    examples = []
    for group, image_id in select_images(quality, params, seed):
        record, caption = records[image_id], data.generated[image_id]
        examples.append(
            Example(
                image_id=image_id,
                group=group,
                image=_read_image(data, record, MAX_SIDE),
                words=caption.words,
                language=caption.best.language,
                trained_words=None if data.trained_captions is None else data.trained_captions[image_id],
                attention=caption.attention,
                references=record.captions,
                scores={name: float(values[rows[image_id]]) for name, values in metrics.image_scores.items()},
                boxes={
                    word.position: word.boxes
                    for word in find_grounded_words(caption.words, data.visible_objects(record))
                },
            )
        )
    return examples


def build_thumbnails(data: EvaluationData, image_ids: Collection[int]) -> dict[int, Thumbnail]:
    """Build the thumbnails of images, by image id.

    Args:
        data: Artifacts of the split.
        image_ids: Ids of images of the split.

    Raises:
        UserError: An image is unreadable.
    """
    return {
        record.image_id: Thumbnail(
            image=_read_image(data, record, MAX_THUMBNAIL_SIDE), words=data.generated[record.image_id].words
        )
        for record in data.records
        if record.image_id in image_ids
    }


def _read_image(data: EvaluationData, record: Record, max_side: int) -> Pixels:
    """Read the part of an image that the grid covers, with at most `max_side` px at the longer side."""
    path = data.inputs.image_dir / record.file
    return read_visible(path, min(max_side, max(upright_size(path))), data.store.spec.frame, data.store.views[0])
