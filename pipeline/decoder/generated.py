"""Generated captions and their attention: `captions.json` in COCO's results format, and `attention.h5`.

This module alone writes and reads them. Shapes: `N` images, `T` words, `P` regions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.hdf5 import open_artefact
from pipeline.publish import write_json

SCHEMA = "gridcap.attention"
SCHEMA_VERSION = 1
CAPTIONS_FILE = "captions.json"
ATTENTION_FILE = "attention.h5"


@dataclass(frozen=True, kw_only=True)
class Generated:
    """The best caption of one image."""

    image_id: int
    words: tuple[str, ...]
    log_probability: float
    """Sum over the words and the end, in nats."""
    attention: NDArray[np.float16]
    """[T, P]: where the decoder looked for each word; region r is in row r // grid_width of the picture."""


def write_generated(folder: Path, captions: list[Generated], grid: tuple[int, int], fingerprint: str) -> None:
    """Write both files into `folder`; `grid` is the height and width whose product is P."""
    results = [{"image_id": caption.image_id, "caption": " ".join(caption.words)} for caption in captions]
    write_json(folder / CAPTIONS_FILE, results)
    longest = max((len(caption.words) for caption in captions), default=0)
    maps = np.zeros((len(captions), longest, grid[0] * grid[1]), dtype=np.float16)
    for row, caption in enumerate(captions):
        maps[row, : len(caption.words)] = caption.attention
    columns = {
        "image_id": (
            np.array([caption.image_id for caption in captions], dtype=np.int64),
            "the image that the caption describes",
        ),
        "length": (
            np.array([len(caption.words) for caption in captions], dtype=np.int32),
            "words of the caption",
        ),
        "log_probability": (
            np.array([caption.log_probability for caption in captions], dtype=np.float64),
            "sum of the log-probabilities of the words and the end, in nats",
        ),
        "attention": (
            maps,
            "[caption, word, region]: where the decoder looked for the word; region r is in row r // grid_width; "
            "words sum to 1, what is beyond the caption is 0",
        ),
    }
    with h5py.File(folder / ATTENTION_FILE, "w") as file:
        file.attrs.update(
            {
                "schema": SCHEMA,
                "schema_version": SCHEMA_VERSION,
                "fingerprint": fingerprint,
                "grid_height": grid[0],
                "grid_width": grid[1],
            }
        )
        for name, (values, description) in columns.items():
            file[name] = values
            file[name].attrs["description"] = description
        file.create_dataset(
            "caption",
            data=[" ".join(caption.words) for caption in captions],
            dtype=h5py.string_dtype(),
        ).attrs["description"] = "the caption's words joined by spaces"


def read_generated(folder: Path) -> list[Generated]:
    """Read the captions with their attention, in the order written.

    Raises `UserError`, naming the file, where one is missing, damaged or of another schema.
    """
    with open_artefact(folder / ATTENTION_FILE, SCHEMA, SCHEMA_VERSION, "generate") as file:
        return list(_rows(file))


def _rows(file: h5py.File) -> Iterator[Generated]:
    columns = (file[name][:] for name in ("image_id", "log_probability", "attention"))
    for image_id, log_probability, maps, caption in zip(*columns, file["caption"].asstr()[:], strict=True):
        words = tuple(caption.split())
        yield Generated(
            image_id=int(image_id),
            words=words,
            log_probability=float(log_probability),
            attention=maps[: len(words)],
        )
