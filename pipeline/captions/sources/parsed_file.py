"""The entry: one image as a caption file tells of it, before it is checked against disk and other images."""

import codecs
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.captions.records import Split, Thing
from pipeline.errors import UserError

T = TypeVar("T")

ImageId = Annotated[int, Field(ge=0, lt=2**63)]

_FLICKR_NAME = re.compile(r"(\d{1,18})_[0-9a-f]{10}\.jpe?g", re.ASCII | re.IGNORECASE)
_SHOWN = 3


class Caption(NamedTuple):
    """A caption as it stands in a file."""

    text: str
    place: str
    """File and line, or file and entry, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One image of a caption file."""

    image_id: int
    file: str
    """Path below the image folder, with forward slashes; not yet checked."""
    place: str
    """File and line, or file and entry, for messages."""
    split: Split | None
    """What the caption file itself says."""
    captions: tuple[Caption, ...]
    subset: str | None = None
    things: tuple[Thing, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What one caption file holds."""

    entries: list[Entry]
    unmatched_captions: list[str]
    """Places of captions whose image the file does not list."""


def join_relative(folder: str, *names: str) -> str:
    """Join names to a path below the image folder; `.` adds nothing."""
    return str(PurePosixPath(folder, *names))


def id_from_name(file: str) -> int:
    """Image id that depends on the file's name alone, never on other images.

    Names of Flickr photographs (`1000268201_693b08cb0e.jpg`) give their leading digits, all others the first
    48 bits of the SHA-256 of the path below the image folder.
    """
    if match := _FLICKR_NAME.fullmatch(PurePosixPath(file).name):
        return int(match[1])
    return int.from_bytes(hashlib.sha256(file.encode()).digest()[:6])


def escapes_root(name: str) -> bool:
    """Whether a path leads out of the folder that it starts from."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def require_relative(*names: str) -> None:
    """Raise `ValueError` for a path that leads out of its folder: DVC does not track what lies there."""
    for name in names:
        if escapes_root(name):
            raise ValueError(f"{name!r} must be a path below dataset.root, without '..'")


def some(sentences: Sequence[str]) -> str:
    """Show the first few of many faults and say how many more there are."""
    rest = len(sentences) - _SHOWN
    return "; ".join(sentences[:_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def read_bytes(path: Path) -> bytes:
    """Read a file of the dataset, without a byte-order mark; raises `UserError` where there is none."""
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(
            f"{path}: {reason}; put it there, or mend dataset.root and the file names in section dataset"
        ) from error


def read_text(path: Path) -> str:
    """Read a text file of the dataset; raises `UserError`, naming the line, where it is not UTF-8."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02x}"
        raise UserError(f"{path}, line {line}: {found} is not UTF-8; convert the file to UTF-8") from error


def read_json(path: Path, form: type[T], wanted: str) -> T:
    """Read a JSON file of the dataset and check its form; `wanted` says in a few words what it should hold.

    Raises `UserError`, naming the places, where the file is no JSON or has another form.
    """
    try:
        return TypeAdapter(form).validate_json(read_bytes(path), strict=True)
    except ValidationError as error:
        faults = [f"{_json_place(fault['loc'])}{fault['msg']}" for fault in error.errors(include_url=False)]
        raise UserError(f"{path}: is no {wanted}: {some(faults)}; mend the file or dataset.format") from error


def _json_place(steps: tuple[int | str, ...]) -> str:
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return f"{place.removeprefix('.')}: " if place else ""
