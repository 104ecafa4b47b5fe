"""Reader of captions without images: one caption a line, or a caption file of COCO or Flickr."""

import re
from pathlib import Path
from typing import NamedTuple

from pipeline.captions.sources import coco, flickr8k
from pipeline.captions.sources.parsed_file import SourceCaption, locate_control_characters, read_text
from pipeline.captions.text import TextCaption
from pipeline.errors import UserError, summarize

_README = "README.md"
_TABLE_SUFFIXES = (".csv", ".tsv")
_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_IMAGE_NAME = re.compile(r"[^\s,;|\"']\.(jpe?g|png|gif|bmp|webp|tiff?)\b", re.IGNORECASE)


class _Entry(NamedTuple):
    """A row of a file."""

    caption: SourceCaption
    """Without text if the row has no caption."""
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
        entries = [_Entry(caption, image.file) for image in images for caption in image.captions]
    else:
        entries = _parse_text(path, name, read_text(path))
    _check(path, [entry.caption for entry in entries])
    return [TextCaption(entry.caption.text.strip(), entry.image) for entry in entries]


def _parse_text(path: Path, name: str, text: str) -> list[_Entry]:
    if (rows := flickr8k.parse_rows(path, text, needs_names=False)) is not None:
        return [_Entry(SourceCaption(row.caption or "", f"{path}:{row.line}"), row.name or None) for row in rows]
    if name.endswith(_TABLE_SUFFIXES) and text.strip():
        raise UserError(
            f"{path}:1: expected a header with the columns 'image' and 'caption', or 'caption' alone, separated by"
            " commas. Add or correct the header, or rename the file to .txt if each line is a caption."
        )
    lines = enumerate(_LINE_BREAK.split(text), start=1)
    captions = [SourceCaption(line, f"{path}:{number}") for number, line in lines if line.strip()]
    for caption in captions:
        # Read as captions, the rows of a table would hide the names of val and test images.
        if _IMAGE_NAME.search(caption.text):
            raise UserError(
                f"{caption.location}: has the name of an image, but the first line is not a header with the columns"
                " 'image' and 'caption'. Add the header, or remove the names."
            )
    return [_Entry(caption) for caption in captions]


def _check(path: Path, captions: list[SourceCaption]) -> None:
    if not captions:
        raise UserError(f"{path}: has no captions. Add captions, or set train.text to null.")
    faults = {
        "rows without a caption": [caption.location for caption in captions if not caption.text.strip()],
        "captions with control characters": locate_control_characters(captions),
    }
    for fault, locations in faults.items():
        if locations:
            raise UserError(f"{fault} ({len(locations)}): {summarize(locations)}. Fix or remove them.")
