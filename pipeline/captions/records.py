"""Records: one per image, with its split, captions and annotated objects, in the same format for every dataset.

`records.jsonl` holds one record per line, sorted by image id.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import read_bytes, write_atomically
from pipeline.errors import UserError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Policy = Literal["error", "skip"]
"""Policy for a kind of faults in the dataset: stop with an error, or skip the faulty images or captions and count them.
"""
RECORDS_FILE = "records.jsonl"
_REMEDY = "Run `dvc repro -f -s prepare`."


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatedObject:
    """An annotated object of an image."""

    attributes: dict[str, str]
    """Attribute values by name, such as `{"shape": "cube", "color": "red"}`."""
    box: tuple[float, float, float, float]
    """Left, top, width and height, as fractions of the image's width and height."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One image of the dataset."""

    image_id: int
    file: str
    """Path relative to the image folder, with forward slashes."""
    split: Split
    captions: tuple[str, ...]
    """Captions as in the dataset, stripped of surrounding whitespace; at least one."""
    subset: str | None = None
    """Part of the split whose scores are also reported separately; None if there is no such part."""
    objects: tuple[AnnotatedObject, ...] = ()
    """Annotated objects; empty if the dataset has no such annotations."""


_record_adapter = TypeAdapter(Record)


def write_records(folder: Path, records: Iterable[Record]) -> None:
    """Write `records.jsonl` into `folder`, sorted by image id."""
    ordered = sorted(records, key=lambda record: record.image_id)
    lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in ordered]
    write_atomically(folder / RECORDS_FILE, "".join(lines))


def read_records(folder: Path, split: Split | None = None) -> list[Record]:
    """Read `records.jsonl` from `folder`.

    Args:
        folder: Output folder of stage `prepare`.
        split: The split to read; None reads all records.

    Returns:
        Records sorted by image id.

    Raises:
        UserError: The file is missing, or a line is not a valid record.
    """
    return [record for record in _parse_records(folder / RECORDS_FILE) if split in (None, record.split)]


def _parse_records(path: Path) -> Iterator[Record]:
    for line_number, line in enumerate(read_bytes(path, _REMEDY).splitlines(), start=1):
        try:
            yield _record_adapter.validate_json(line)
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(str(part) for part in fault["loc"])
            raise UserError(f"{path}:{line_number}: not a valid record ({key}: {fault['msg']}). {_REMEDY}") from error
