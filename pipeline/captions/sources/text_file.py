"""Reader of captions without images: one caption a line, or a caption file of COCO or Flickr."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.captions.sources import coco, flickr8k
from pipeline.captions.sources.parsed_file import CONTROL_CHARACTER, read_text
from pipeline.captions.text import TextCaption
from pipeline.errors import UserError, summarize

_README = "README.md"
_TABLE_SUFFIXES = (".csv", ".tsv")
_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_IMAGE_NAME = re.compile(r"[^\s,;|\"']\.(jpe?g|png|gif|bmp|webp|tiff?)\b", re.IGNORECASE)


class _Entry(NamedTuple):
    """A caption of a file, or a row without one."""

    location: str
    """File and line, or file and entry, for error messages."""
    text: str | None
    """None if the row is malformed."""
    image: str | None = None
    """As `TextCaption.image`."""


def read_text_captions(path: Path) -> list[TextCaption]:
    """Read a file of captions, or all files of a folder but its README.md and hidden files.

    A file `*.json` is read as a COCO caption file. A file that begins as a Flickr caption file, such as CSV with the
    header `image,caption`, is read as one, and so is CSV with the header `caption`. In any other file, each line is a
    caption, but other files `*.csv` and `*.tsv` are refused.

    Args:
        path: The file or folder. An empty folder has no captions.

    Raises:
        UserError: A file is missing or malformed, a row has no caption or one with control characters, a file has no
            captions, or the folder has a folder.
    """
    if not path.is_dir():
        return _read_file(path)
    entries = sorted(entry for entry in path.iterdir() if entry.name != _README and not entry.name.startswith("."))
    folders = [str(entry) for entry in entries if entry.is_dir()]
    if folders:
        raise UserError(f"{summarize(folders)}: is a folder. Put its files into {path} itself.")
    return [caption for entry in entries for caption in _read_file(entry)]


def _read_file(path: Path) -> list[TextCaption]:
    name = path.name.removesuffix(".gz").lower()
    if name.endswith(".json"):
        images = coco.parse(path, ".").images
        entries = [_Entry(caption.location, caption.text, image.file) for image in images for caption in image.captions]
    elif (rows := flickr8k.read_rows(path, needs_names=False)) is not None:
        entries = [_Entry(f"{path}:{row.line}", row.caption, row.name or None) for row in rows]
    elif name.endswith(_TABLE_SUFFIXES) and read_text(path).strip():
        raise UserError(
            f"{path}:1: expected a header with the columns 'image' and 'caption', or 'caption' alone, separated by"
            " commas. Add or correct the header, or rename the file to .txt if each line is a caption."
        )
    else:
        entries = list(_read_lines(path))
    _check(path, entries)
    return [TextCaption(entry.text.strip(), entry.image) for entry in entries if entry.text]


def _read_lines(path: Path) -> Iterator[_Entry]:
    for line_number, line in enumerate(_LINE_BREAK.split(read_text(path)), start=1):
        # Read as captions, the rows of a table would hide the names of val and test images.
        if _IMAGE_NAME.search(line):
            raise UserError(
                f"{path}:{line_number}: has the name of an image, but the first line is not a header with the columns"
                " 'image' and 'caption'. Add the header, or remove the names."
            )
        if line.strip():
            yield _Entry(f"{path}:{line_number}", line)


def _check(path: Path, entries: list[_Entry]) -> None:
    if not entries:
        raise UserError(f"{path}: has no captions. Add captions, or set train.text to null.")
    faults = {
        "rows without a caption": [entry.location for entry in entries if not (entry.text and entry.text.strip())],
        "captions with control characters": [
            f"{entry.location} ({match[0]!r})"
            for entry in entries
            if entry.text and (match := CONTROL_CHARACTER.search(entry.text))
        ],
    }
    for fault, locations in faults.items():
        if locations:
            raise UserError(f"{fault} ({len(locations)}): {summarize(locations)}. Fix or remove them.")
