"""Generated captions: `captions.json` in COCO's results format, `n_best.json`, and `attention.h5`.

This module alone writes and reads them. Shapes: `N` images, `T` words, `P` regions.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Schema
from pipeline.errors import UserError
from pipeline.hdf5 import open_artifact

SCHEMA = Schema("gridcap.attention", 2)
_REMEDY = "Run `dvc repro -f -s generate`."
CAPTIONS_FILE = "captions.json"
N_BEST_FILE = "n_best.json"
ATTENTION_FILE = "attention.h5"

# HDF5 takes its time for each write, so some images wait for each other.
_IMAGES_A_BLOCK = 64
# A chunk beyond a caption's end takes no room.
_WORDS_A_CHUNK = 8

_COLUMNS = {
    "image_id": (np.int64, "the image that the caption describes"),
    "length": (np.int32, "words of the caption"),
    "log_probability": (np.float64, "sum of the log-probabilities of the words and the end, in nats"),
    "score": (np.float64, "what captions were ranked by: the log-probability over the length penalty"),
    "caption": (h5py.string_dtype(), "the caption's words joined by spaces"),
}
_MAPS = (
    "[caption, word, region]: where the decoder looked for the word; region r is in row r // grid_width; "
    "words sum to 1, what is beyond the caption is 0"
)


@dataclass(frozen=True, kw_only=True)
class RankedCaption:
    """One of the captions found for an image."""

    words: tuple[str, ...]
    log_probability: float
    """Sum over the words and the end, in nats."""
    score: float
    """What captions are ranked by: the log-probability over the length penalty."""


@dataclass(frozen=True, kw_only=True)
class GeneratedCaptions:
    """What was found for one image."""

    image_id: int
    captions: tuple[RankedCaption, ...]
    """At least one, the best first."""
    attention: NDArray[np.float16]
    """[T, P]: where the decoder looked for each word of the best; region r is in row r // grid_width of the picture."""

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the best caption."""
        return self.captions[0].words

    @property
    def log_probability(self) -> float:
        """That of the best caption: the sum over its words and its end, in nats."""
        return self.captions[0].log_probability


def write_captions(
    folder: Path, generated: Iterable[GeneratedCaptions], images: int, grid: tuple[int, int], fingerprint: str
) -> None:
    """Write the three files into `folder`, some images at a time as they come: what is written is not held.

    `images` is how many will come; `grid` is the height and width whose product is P.
    """
    with (
        _json_list(folder / CAPTIONS_FILE) as write_best,
        _json_list(folder / N_BEST_FILE) as write_all,
        h5py.File(folder / ATTENTION_FILE, "w") as file,
    ):
        file.attrs.update(
            {
                "schema": SCHEMA.name,
                "schema_version": SCHEMA.version,
                "fingerprint": fingerprint,
                "grid_height": grid[0],
                "grid_width": grid[1],
            }
        )
        regions = grid[0] * grid[1]
        maps = file.create_dataset(
            "attention",
            shape=(images, 0, regions),
            maxshape=(None, None, regions),
            chunks=(1, _WORDS_A_CHUNK, regions),
            dtype=np.float16,
        )
        maps.attrs["description"] = _MAPS
        for name, (kind, description) in _COLUMNS.items():
            file.create_dataset(name, shape=images, dtype=kind).attrs["description"] = description
        for first, part in enumerate(_blocks(generated)):
            rows = slice(first * _IMAGES_A_BLOCK, first * _IMAGES_A_BLOCK + len(part))
            ranked = [[_plain(caption) for caption in one.captions] for one in part]
            for one, captions in zip(part, ranked, strict=True):
                write_best({"image_id": one.image_id, "caption": captions[0]["caption"]})
                write_all({"image_id": one.image_id, "captions": captions})
            longest = max(len(one.words) for one in part)
            maps.resize(max(longest, maps.shape[1]), axis=1)
            for row, one in enumerate(part, start=rows.start):
                maps[row, : len(one.words)] = one.attention
            file["image_id"][rows] = [one.image_id for one in part]
            file["length"][rows] = [len(one.words) for one in part]
            for name in ("log_probability", "score", "caption"):
                file[name][rows] = [captions[0][name] for captions in ranked]


def _blocks(generated: Iterable[GeneratedCaptions]) -> Iterator[list[GeneratedCaptions]]:
    images = iter(generated)
    while part := list(islice(images, _IMAGES_A_BLOCK)):
        yield part


def _plain(caption: RankedCaption) -> dict[str, Any]:
    return {"caption": " ".join(caption.words), "log_probability": caption.log_probability, "score": caption.score}


@contextmanager
def _json_list(path: Path) -> Iterator[Callable[[Any], None]]:
    """Write a JSON list, one value a line."""
    with path.open("w", encoding="utf-8") as file:
        separator = "["

        def write(value: Any) -> None:
            nonlocal separator
            file.write(f"{separator}\n{json.dumps(value, ensure_ascii=False, allow_nan=False)}")
            separator = ","

        yield write
        file.write("[]\n" if separator == "[" else "\n]\n")


def read_captions(folder: Path) -> list[GeneratedCaptions]:
    """Read the captions with their attention, in the order written.

    Raises `UserError`, naming the file, where one is missing, damaged or of another schema.
    """
    found = _read_n_best(folder / N_BEST_FILE)
    with open_artifact(folder / ATTENTION_FILE, SCHEMA, _REMEDY) as file:
        if [image_id for image_id, _ in found] != file["image_id"][:].tolist():
            raise UserError(
                f"{folder}: {N_BEST_FILE} and {ATTENTION_FILE} are of different runs; run `dvc repro -f -s generate`"
            )
        return [
            GeneratedCaptions(image_id=image_id, captions=captions, attention=maps[: len(captions[0].words)])
            for (image_id, captions), maps in zip(found, file["attention"], strict=True)
        ]


def _read_n_best(path: Path) -> list[tuple[int, tuple[RankedCaption, ...]]]:
    try:
        return [
            (
                image["image_id"],
                tuple(
                    RankedCaption(
                        words=tuple(one["caption"].split()),
                        log_probability=one["log_probability"],
                        score=one["score"],
                    )
                    for one in image["captions"]
                ),
            )
            for image in json.loads(path.read_text(encoding="utf-8"))
        ]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run `dvc repro generate`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run `dvc repro -f -s generate`") from error
