"""The images that the report shows: those captioned best, those captioned worst, and some at random."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from pipeline.captions.records import Record
from pipeline.evaluation.scene_scores import grounded_words
from pipeline.features.images import Pixels, View, read_views, upright_size
from pipeline.generation.caption_io import GeneratedCaptions
from pipeline.metrics.grounding import Box
from pipeline.params import params_section

Choice = Literal["best", "worst", "random"]

LONGER_SIDE = 448
"""Of a picture in the report, in px, at most."""


@params_section
class ReportParams:
    """Which images the report shows."""

    best: Annotated[int, Field(ge=0)]
    """Images with the highest CIDEr-D in the report."""
    worst: Annotated[int, Field(ge=0)]
    """Images with the lowest CIDEr-D in the report."""
    random: Annotated[int, Field(ge=0)]
    """Images drawn from the others for the report."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image with its caption, for showing."""

    image_id: int
    choice: Choice
    """Why it is shown."""
    picture: Pixels
    """uint8 RGB [H, W, 3], upright."""
    words: tuple[str, ...]
    """The generated caption, T words."""
    attention: NDArray[np.floating]
    """[T, h, w]: weights of the regions for each word."""
    references: tuple[str, ...]
    scores: Mapping[str, float]
    """Of the caption alone, by name."""
    boxes: Mapping[int, Sequence[Box]]
    """By index of a word: where that is known, boxes of the things that the word speaks of."""


def choose(quality: Mapping[int, float], params: ReportParams, seed: int) -> list[tuple[Choice, int]]:
    """Choose images by a score of each: the best, best first, the worst, worst first, then others at random.

    None is chosen twice; where there are too few, the later kinds get what is left. Of equal scores the lower
    image id comes first.
    """
    falling = sorted(quality, key=lambda image_id: (-quality[image_id], image_id))
    best = falling[: params.best]
    rising = sorted(falling[params.best :], key=lambda image_id: (quality[image_id], image_id))
    worst, rest = rising[: params.worst], sorted(rising[params.worst :])
    drawn = random.Random(seed).sample(rest, min(params.random, len(rest)))
    kinds: list[tuple[Choice, list[int]]] = [("best", best), ("worst", worst), ("random", drawn)]
    return [(kind, image_id) for kind, image_ids in kinds for image_id in image_ids]


def examples(
    records: Sequence[Record],
    generated: Mapping[int, GeneratedCaptions],
    scores: Mapping[int, Mapping[str, float]],
    grid: tuple[int, int],
    view: str,
    images: Path,
    params: ReportParams,
    seed: int,
) -> list[Example]:
    """Choose images by CIDEr-D and gather what is shown of them; `view` is the part of them that was captioned.

    `generated` and `scores`, of each caption alone, are by image id. Raises `UserError` where a picture cannot be read.
    """
    by_id = {record.image_id: record for record in records}
    chosen = choose({image_id: own["CIDEr-D"] for image_id, own in scores.items()}, params, seed)
    return [
        Example(
            image_id=image_id,
            choice=choice,
            picture=_picture(images / by_id[image_id].file, view),
            words=generated[image_id].words,
            attention=generated[image_id].attention.reshape(-1, *grid),
            references=by_id[image_id].captions,
            scores=scores[image_id],
            boxes={
                word.position: word.boxes for word in grounded_words(generated[image_id].words, by_id[image_id].objects)
            },
        )
        for choice, image_id in chosen
    ]


def _picture(path: Path, view: str) -> Pixels:
    """The picture in its own proportions; regions of the square that the encoder saw lie on it in the same places."""
    square = read_views(path, LONGER_SIDE, (cast(View, view),))[0]
    width, height = upright_size(path)
    scale = min(1.0, LONGER_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pixels: Pixels = np.array(Image.fromarray(square).resize(size, Image.Resampling.LANCZOS))
    return pixels
