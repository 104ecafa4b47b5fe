"""The output of every parser: the images of one caption file, before any check against disk or other files."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field

from pipeline.artifacts import read_bytes
from pipeline.captions.records import AnnotatedObject, Split, escapes_root
from pipeline.errors import UserError

REMEDY = "Fix the file, or correct its path or, for a dataset, dataset.format in params.yaml."
"""What to do about a caption or split file that is missing or malformed."""

_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Control characters, except the tab and the line breaks, which a caption may contain."""

_DIGITS = re.compile(r"\d{1,19}", re.ASCII)


def _parse_id(value: object) -> object:
    is_integer = isinstance(value, float) and value.is_integer()
    is_digits = isinstance(value, str) and _DIGITS.fullmatch(value)
    return int(value) if is_integer or is_digits else value  # type: ignore[call-overload]


IntegerId = Annotated[int, BeforeValidator(_parse_id)]
"""An id of a JSON file: an integer, a string of digits, or an integer with a decimal point, as pandas writes it."""
ImageId = Annotated[IntegerId, Field(ge=0, lt=2**63)]
"""Id of an image of the dataset."""

_FLICKR_NAME = re.compile(r"(\d{1,18})_[0-9a-f]{10}\.jpe?g", re.ASCII | re.IGNORECASE)


class SourceCaption(NamedTuple):
    """A caption, unchanged from the caption file."""

    text: str
    location: str
    """File and line, or file and entry, for error messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedImage:
    """One image of a caption file."""

    image_id: int
    file: str
    """Path relative to the image folder, with forward slashes; not yet checked."""
    location: str
    """File and line, or file and entry, for error messages."""
    split: Split | None
    """Split that the caption file sets, or None."""
    captions: tuple[SourceCaption, ...]
    has_name_id: bool = False
    """Whether `image_id` is `id_from_name(file)`, since the caption file sets no ids."""
    num_precanned_captions: int = 0
    """Number of captions that are a fixed sentence of the annotators' program, not in `captions`."""
    num_rejected_captions: int = 0
    """Number of other captions that the dataset's authors rejected, not in `captions`."""
    subset: str | None = None
    """As `Record.subset`."""
    objects: tuple[AnnotatedObject, ...] = ()
    """As `Record.objects`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedFile:
    """Contents of one caption file."""

    images: list[ParsedImage]
    unmatched_captions: list[str]
    """Locations of captions whose image the file does not list."""
    malformed_rows: list[str] = field(default_factory=list)
    """Locations of rows without a readable caption."""


def is_accepted(annotation: Mapping[str, Any]) -> bool:
    """Whether VizWiz does not mark an annotation as precanned or rejected."""
    return not (annotation.get("is_precanned") or annotation.get("is_rejected"))


def has_control_characters(text: str) -> bool:
    """Whether a caption has a control character other than the tab and line breaks."""
    return _CONTROL_CHARACTER.search(text) is not None


def locate_control_characters(captions: Iterable[SourceCaption]) -> list[str]:
    """Return the locations of captions with control characters, each with the first of them."""
    return [
        f"{caption.location} ({match[0]!r})"
        for caption in captions
        if (match := _CONTROL_CHARACTER.search(caption.text))
    ]


def join_relative(folder: str, *names: str) -> str:
    """Join names to a path relative to the image folder. A name `.` adds nothing."""
    return str(PurePosixPath(folder, *names))


def id_from_name(file: str) -> int:
    """Derive an image id from the image's path alone, so that it never depends on other images.

    For a Flickr name (`1000268201_693b08cb0e.jpg`) the id is the leading digits; for any other path, the first 48 bits
    of its SHA-256.

    Args:
        file: Path relative to the image folder.
    """
    if match := _FLICKR_NAME.fullmatch(PurePosixPath(file).name):
        return int(match[1])
    return id_from_path(file)


def id_from_path(file: str) -> int:
    """Return the first 48 bits of the SHA-256 of an image's path relative to the image folder."""
    return int.from_bytes(hashlib.sha256(file.encode()).digest()[:6])


def require_relative(*names: str) -> None:
    """Check that paths stay below dataset.root, since DVC does not track files outside it.

    Raises:
        ValueError: A path may leave dataset.root.
    """
    for name in names:
        if escapes_root(name):
            raise ValueError(f"{name!r} must be a path below dataset.root, without '..'")


def read_text(path: Path) -> str:
    """Read a UTF-8 text file of the dataset.

    Raises:
        UserError: The file is missing or unreadable, or a line is not UTF-8.
    """
    content = read_bytes(path, REMEDY)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise UserError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8. Convert the file to UTF-8.") from error
