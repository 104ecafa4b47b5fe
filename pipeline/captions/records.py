"""Records: one per image, with its split, captions and annotated objects, in the same format for every dataset.

`records.jsonl` holds one record per line, sorted by image id; `index.json` holds its number of records and its SHA-256.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from pipeline.artifacts import Schema, read_bytes, read_json, write_atomically, write_json
from pipeline.errors import UserError

SCHEMA = Schema("gridcap.records", 1)
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Policy = Literal["error", "skip"]
"""Policy for a kind of faults in the dataset: stop with an error, or skip the faulty images or captions and count them.
"""
RECORDS_FILE = "records.jsonl"
INDEX_FILE = "index.json"
_REMEDY = "Run `dvc repro -f -s prepare`."


def escapes_root(name: str) -> bool:
    """Whether a path may leave its root folder, because it is absolute or contains `..`."""
    return name.startswith("/") or ".." in name.split("/")


def _require_inside(file: str) -> str:
    if escapes_root(file) or "\0" in file:
        raise ValueError("must be a path below the image folder, without '..' and NUL")
    return file


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatedObject:
    """An annotated object of an image."""

    attributes: dict[str, str]
    """Attribute values by name, such as `{"shape": "cube", "color": "red"}`."""
    box: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    """Left, top, width and height, as fractions of the image's width and height."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One image of the dataset."""

    image_id: Annotated[int, Field(ge=0, lt=2**63)]
    file: Annotated[str, Field(min_length=1), AfterValidator(_require_inside)]
    """Path relative to the image folder, with forward slashes."""
    split: Split
    captions: Annotated[tuple[Annotated[str, Field(pattern=r"\S")], ...], Field(min_length=1)]
    """Captions as in the dataset, stripped of surrounding whitespace; at least one, none of them empty."""
    subset: str | None = None
    """Part of the split whose scores are also reported separately; None if there is no such part."""
    objects: tuple[AnnotatedObject, ...] = ()
    """Annotated objects; empty if the dataset has no such annotations."""


def empty_split_error(source: Path, split: Split, use: str) -> UserError:
    """Describe that a stage needs the images of a split that has none.

    Args:
        source: Artifact or params file without such images.
        split: The split.
        use: What the stage needs the images for, as a clause after a comma.
    """
    return UserError(
        f"{source}: no images in split {split}, {use}. Assign images to it with dataset.captions or dataset.splits. To"
        " score a trained model on this dataset, see section Score a model on another dataset of docs/datasets.md."
    )


class _Index(TypedDict):
    num_records: int
    sha256: str


_record_adapter = TypeAdapter(Record)


def write_records(folder: Path, records: Iterable[Record]) -> None:
    """Write `records.jsonl`, sorted by image id, and `index.json` into `folder`."""
    ordered = sorted(records, key=lambda record: record.image_id)
    content = b"".join(_record_adapter.dump_json(record) + b"\n" for record in ordered)
    write_atomically(folder / RECORDS_FILE, content)
    index = {"num_records": len(ordered), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(folder / INDEX_FILE, {**SCHEMA.header, **index})


def read_records(folder: Path, split: Split | None = None) -> list[Record]:
    """Read all records, or those of one split, as `iter_records` does."""
    return list(iter_records(folder, split))


def iter_records(folder: Path, split: Split | None = None) -> Iterator[Record]:
    """Read `records.jsonl` record by record, after comparing it with its SHA-256 in `index.json`.

    Args:
        folder: Output folder of stage `prepare`.
        split: The split to read; None reads all records.

    Yields:
        Records in ascending order of their image ids, which are unique.

    Raises:
        UserError: A file is missing or altered, or a line is not a valid record.
    """
    index = read_json(folder / INDEX_FILE, _Index, _REMEDY, SCHEMA)
    path = folder / RECORDS_FILE
    content = read_bytes(path, _REMEDY)
    if hashlib.sha256(content).hexdigest() != index["sha256"]:
        for _ in _parse_records(path, content):  # the number of an invalid line says more than a digest
            pass
        raise UserError(f"{path}: SHA-256 differs from {INDEX_FILE}. {_REMEDY}")
    num_records = 0
    for record in _parse_records(path, content):
        num_records += 1
        if split in (None, record.split):
            yield record
    if num_records != index["num_records"]:
        raise UserError(f"{path}: has {num_records} records, but {INDEX_FILE} has {index['num_records']}. {_REMEDY}")


def _parse_records(path: Path, content: bytes) -> Iterator[Record]:
    previous_id = -1
    for line_number, line in enumerate(io.BytesIO(content), start=1):
        try:
            record = _record_adapter.validate_json(line, strict=True)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in fault["loc"])
            raise UserError(f"{path}:{line_number}: not a valid record ({key}: {fault['msg']}). {_REMEDY}") from error
        if record.image_id <= previous_id:
            raise UserError(
                f"{path}:{line_number}: image id {record.image_id} does not follow {previous_id} of the line before."
                f" {_REMEDY}"
            )
        previous_id = record.image_id
        yield record
