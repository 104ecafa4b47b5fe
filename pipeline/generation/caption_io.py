"""Reader and writer of generated captions: `captions.json`, `n_best.json` and `attention.h5`.

`captions.json` is in COCO's results format, and so is `trained_captions.json`, which has the captions of the model
before its refinement. Shapes: `N` images, `T` words, `P` regions in a grid of `H` x `W`.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from pipeline.artifacts import Int64, Schema, naming, read_json
from pipeline.captions.languages import join_words
from pipeline.errors import UserError
from pipeline.generation.caption import Caption
from pipeline.hdf5 import checked_dataset, create_artifact, open_artifact, read_dataset
from pipeline.startup import defer_interrupts

SCHEMA = Schema("gridcap.attention", 2)
CAPTIONS_FILE = "captions.json"
TRAINED_CAPTIONS_FILE = "trained_captions.json"
N_BEST_FILE = "n_best.json"
ATTENTION_FILE = "attention.h5"

_REMEDY = "Run `dvc repro -f -s generate`."
# Every write to HDF5 has a fixed overhead, so images are written in blocks.
_IMAGES_PER_BLOCK = 64
# HDF5 allocates no space for chunks that are never written, such as those beyond the end of a caption.
_WORDS_PER_CHUNK = 8

_COLUMNS = {
    "image_id": (np.int64, "id of the image"),
    "length": (np.int32, "words of the caption"),
    "log_probability": (np.float64, "sum of the log-probabilities of the words and <end>, in nats"),
    "score": (np.float64, "length-normalized log-probability, by which captions are ranked"),
    "caption": (h5py.string_dtype(), "the best caption, words joined by spaces"),
}
_ATTENTION_DESCRIPTION = (
    "[image, word, region]: attention weights of each word of the best caption; region r is in row r // grid_width of "
    "the grid; each word's weights sum to 1, or to 1 minus the weight of the visual sentinel, and are 0 beyond the "
    "caption's length"
)


@dataclass(frozen=True, kw_only=True)
class GeneratedCaptions:
    """The captions of one image."""

    image_id: int
    captions: tuple[Caption, ...]
    """At least one, best first. When read from files, only the best has attention."""

    @property
    def best(self) -> Caption:
        """The best caption."""
        return self.captions[0]

    @property
    def words(self) -> tuple[str, ...]:
        """Words of the best caption."""
        return self.best.words

    @property
    def attention(self) -> NDArray[np.floating[Any]]:
        """Attention weights of the best caption, [T, H, W]."""
        assert self.best.attention is not None, "the best caption of a search or a file has attention"
        return self.best.attention


def write_captions(
    folder: Path, generated: Iterable[GeneratedCaptions], num_images: int, grid: tuple[int, int], fingerprint: str
) -> None:
    """Write the three files block by block, without holding all captions in memory.

    Args:
        folder: Existing folder for the files.
        generated: The captions, with the attention of the best one of each image.
        num_images: Number of images in `generated`, N.
        grid: Height and width of the attention maps, in regions.
        fingerprint: Fingerprint of the training run, recorded in `attention.h5`.
    """
    with (
        _json_list(folder / CAPTIONS_FILE) as write_best,
        _json_list(folder / N_BEST_FILE) as write_n_best,
        create_artifact(folder / ATTENTION_FILE, SCHEMA) as file,
    ):
        with defer_interrupts():
            file.attrs.update({"fingerprint": fingerprint, "grid_height": grid[0], "grid_width": grid[1]})
            attention = _create_datasets(file, num_images, num_regions=grid[0] * grid[1])
        for index, block in enumerate(_blocks(generated)):
            for image in block:
                write_best(_to_best_row(image))
                write_n_best({"image_id": image.image_id, "captions": [_to_row(caption) for caption in image.captions]})
            with defer_interrupts():
                _write_block(file, attention, index * _IMAGES_PER_BLOCK, block)


def write_trained_captions(folder: Path, generated: Iterable[GeneratedCaptions]) -> None:
    """Write the captions of the trained model, before its refinement, to `trained_captions.json`."""
    with _json_list(folder / TRAINED_CAPTIONS_FILE) as write:
        for image in generated:
            write({**_to_best_row(image), "words": list(image.words)})


def read_trained_captions(folder: Path) -> dict[int, tuple[str, ...]]:
    """Read the words of each caption in `trained_captions.json`, by image id.

    Raises:
        UserError: The file is missing or damaged.
    """
    path = folder / TRAINED_CAPTIONS_FILE
    rows = read_json(path, list[_TrainedRow], _REMEDY)
    captions = {row["image_id"]: tuple(row["words"]) for row in rows}
    if len(captions) < len(rows):
        raise UserError(f"{path}: has an image twice. {_REMEDY}")
    return captions


def _create_datasets(file: h5py.File, num_images: int, num_regions: int) -> h5py.Dataset:
    """Create the datasets of `attention.h5`, with a row for each image, and return that of the attention."""
    attention = file.create_dataset(
        "attention",
        shape=(num_images, 0, num_regions),
        maxshape=(None, None, num_regions),
        chunks=(1, _WORDS_PER_CHUNK, num_regions),
        dtype=np.float16,
    )
    attention.attrs["description"] = _ATTENTION_DESCRIPTION
    for name, (dtype, description) in _COLUMNS.items():
        file.create_dataset(name, shape=num_images, dtype=dtype).attrs["description"] = description
    return attention


def _write_block(file: h5py.File, attention: h5py.Dataset, start: int, block: list[GeneratedCaptions]) -> None:
    """Write the best captions of a block of images.

    Args:
        file: `attention.h5`, with datasets of N rows.
        attention: Dataset of the attention [N, longest caption so far, P]. It stays open for all blocks: reopening it
            for each block would flush its chunks in another order.
        start: Row of the first image.
        block: The images.
    """
    max_length = max(len(image.words) for image in block)
    attention.resize(max(max_length, attention.shape[1]), axis=1)
    for row, image in enumerate(block, start=start):
        weights = image.attention.reshape(-1, attention.shape[2])  # [T, P]
        attention[row, : len(image.words)] = weights.astype(np.float16)
    rows = slice(start, start + len(block))
    file["image_id"][rows] = [image.image_id for image in block]
    file["length"][rows] = [len(image.words) for image in block]
    file["log_probability"][rows] = [image.best.log_probability for image in block]
    file["score"][rows] = [image.best.score for image in block]
    file["caption"][rows] = [" ".join(image.words) for image in block]


class _BestRow(TypedDict):
    """An image in `captions.json`."""

    image_id: Int64
    caption: str


class _TrainedRow(_BestRow):
    """An image in `trained_captions.json`."""

    words: list[str]


# Rounding can make the logarithm of a mean probability positive.
_LogProbability = Annotated[FiniteFloat, Field(le=0.01)]


class _CaptionRow(TypedDict):
    """A caption in `n_best.json`."""

    caption: str
    words: list[str]
    log_probability: _LogProbability
    score: FiniteFloat
    word_log_probabilities: list[_LogProbability]


class _ImageRow(TypedDict):
    """An image in `n_best.json`."""

    image_id: Int64
    captions: Annotated[list[_CaptionRow], Field(min_length=1)]


def _to_best_row(image: GeneratedCaptions) -> _BestRow:
    return {"image_id": image.image_id, "caption": image.best.text}


def _to_row(caption: Caption) -> _CaptionRow:
    return {
        "caption": caption.text,
        "words": list(caption.words),
        "log_probability": caption.log_probability,
        "score": caption.score,
        "word_log_probabilities": list(caption.word_log_probabilities),
    }


def _blocks(generated: Iterable[GeneratedCaptions]) -> Iterator[list[GeneratedCaptions]]:
    images = iter(generated)
    while block := list(islice(images, _IMAGES_PER_BLOCK)):
        yield block


@contextmanager
def _json_list(path: Path) -> Iterator[Callable[[Any], None]]:
    """Write a JSON list, one value per line."""
    with naming(path), path.open("w", encoding="utf-8") as file:
        separator = "["

        def write(value: Any) -> None:
            nonlocal separator
            file.write(f"{separator}\n{json.dumps(value, ensure_ascii=False, allow_nan=False)}")
            separator = ","

        yield write
        file.write("[]\n" if separator == "[" else "\n]\n")
        file.flush()
        os.fsync(file.fileno())


def read_captions(folder: Path, language: str) -> list[GeneratedCaptions]:
    """Read the captions, and the attention of the best one of each image, in the order they were written.

    Args:
        folder: Folder of the files.
        language: Code of the language of the model that generated the captions.

    Raises:
        UserError: A file is missing, damaged or of another schema, or the files do not belong together.
    """
    rows = read_json(folder / N_BEST_FILE, list[_ImageRow], _REMEDY)
    best_rows = read_json(folder / CAPTIONS_FILE, list[_BestRow], _REMEDY)
    image_ids, best = [row["image_id"] for row in rows], [row["captions"][0] for row in rows]
    if len(set(image_ids)) < len(image_ids):
        raise UserError(f"{folder / N_BEST_FILE}: has an image twice. {_REMEDY}")
    if image_ids != [row["image_id"] for row in best_rows] or [row["caption"] for row in best] != [
        row["caption"] for row in best_rows
    ]:
        raise UserError(f"{folder}: {N_BEST_FILE} and {CAPTIONS_FILE} have different captions. {_REMEDY}")
    columns: dict[str, list[Any]] = {
        "image_id": image_ids,
        "length": [len(row["word_log_probabilities"]) for row in best],
        "log_probability": [row["log_probability"] for row in best],
        "score": [row["score"] for row in best],
        "caption": [" ".join(row["words"]) for row in best],
    }
    with open_artifact(folder / ATTENTION_FILE, SCHEMA, _REMEDY) as file:
        for name, (dtype, _) in _COLUMNS.items():
            if read_dataset(file, name, dtype, [len(rows)]).tolist() != columns[name]:
                raise UserError(f"{folder}: {N_BEST_FILE} and {ATTENTION_FILE} have different captions. {_REMEDY}")
        grid = (int(file.attrs["grid_height"]), int(file.attrs["grid_width"]))
        if min(grid) < 1:
            raise ValueError(f"the grid is {grid[0]} x {grid[1]}")
        attention = checked_dataset(file, "attention", np.float16, [len(rows), None, grid[0] * grid[1]])
        return [_read_image(row, language, attention, index, grid) for index, row in enumerate(rows)]


def _read_image(
    row: _ImageRow, language: str, attention: h5py.Dataset, index: int, grid: tuple[int, int]
) -> GeneratedCaptions:
    """Convert a row of `n_best.json`, and read its attention from row `index` of the dataset [N, T, P]."""
    captions = []
    for rank, fields in enumerate(row["captions"]):
        words = tuple(fields["words"])
        if len(words) != len(fields["word_log_probabilities"]):
            raise ValueError(f"{N_BEST_FILE} has another number of words for image {row['image_id']}")
        if join_words(words, language) != fields["caption"]:
            raise ValueError(f"{N_BEST_FILE} has a caption of other words for image {row['image_id']}")
        captions.append(
            Caption(
                words=words,
                language=language,
                log_probability=fields["log_probability"],
                score=fields["score"],
                word_log_probabilities=tuple(fields["word_log_probabilities"]),
                attention=_read_attention(attention, index, len(words)).reshape(-1, *grid) if rank == 0 else None,
            )
        )
    return GeneratedCaptions(image_id=row["image_id"], captions=tuple(captions))


def _read_attention(attention: h5py.Dataset, index: int, num_words: int) -> NDArray[np.float16]:
    """Read the attention [T, P] of one caption from the dataset [N, T, P]."""
    weights: NDArray[np.float16] = attention[index, :num_words]
    if len(weights) < num_words or not ((weights >= 0) & (weights <= 1)).all():
        raise ValueError(f"the attention of row {index} is incomplete, or not from 0 to 1")
    return weights
