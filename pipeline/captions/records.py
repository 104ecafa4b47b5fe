"""The record: one image with its split, its captions and, where they are known, the things shown in it.

`records.jsonl` holds one record a line, ordered by image id, whatever format the dataset came in.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import write_atomically
from pipeline.errors import UserError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
RECORDS_FILE = "records.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """Something that the image is known to show."""

    attributes: dict[str, str]
    """Its kinds and their words, such as `{"shape": "cube", "color": "red"}`."""
    box: tuple[float, float, float, float]
    """Left, top, width and height, as fractions of the image's width and height."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One image of the dataset."""

    image_id: int
    file: str
    """Path below the image folder, with forward slashes."""
    split: Split
    captions: tuple[str, ...]
    """As the dataset has them, stripped of outer white space; at least one."""
    subset: str | None = None
    """Name of a part of the split whose scores are reported apart."""
    things: tuple[Thing, ...] = ()


_record = TypeAdapter(Record)


def write_records(folder: Path, records: Iterable[Record]) -> None:
    """Write `records.jsonl` into `folder`, ordered by image id."""
    ordered = sorted(records, key=lambda record: record.image_id)
    lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in ordered]
    write_atomically(folder / RECORDS_FILE, "".join(lines))


def read_records(folder: Path, split: Split | None = None) -> list[Record]:
    """Read `records.jsonl` from `folder`: all records or those of one split, by ascending image id.

    Raises `UserError`, naming file and line, where the file is missing or a line is no record.
    """
    return [record for record in _parse(folder / RECORDS_FILE) if split in (None, record.split)]


def _parse(path: Path) -> Iterator[Record]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `dvc repro prepare`")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield _record.validate_json(line)
            except ValidationError as error:
                fault = error.errors()[0]
                place = ".".join(str(part) for part in fault["loc"])
                raise UserError(
                    f"{path}, line {number}: is no record ({place}: {fault['msg']}); run `dvc repro -f -s prepare`"
                ) from error
