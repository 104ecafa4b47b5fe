"""Reader of captions without images: one caption a line, or a caption file of COCO or Flickr."""

import re
from collections.abc import Iterable
from pathlib import Path

from pipeline.captions.sources import coco, flickr8k
from pipeline.captions.sources.parsed_file import read_text
from pipeline.captions.text import TextCaption
from pipeline.errors import UserError, summarize

_README = "README.md"
_IMAGE_ROW = re.compile(r"[\"']?[^\s,;|]+\.(jpe?g|png|gif|bmp|webp|tiff?)\b", re.IGNORECASE)
"""A line that begins with the file name of an image."""


def read_text_captions(path: Path) -> list[TextCaption]:
    """Read a file of captions, or all files of a folder but its README.md and hidden files.

    A file `*.json` is read as a COCO caption file. A file that begins as a Flickr caption file, such as CSV with the
    header `image,caption`, is read as one. Every other file has one caption a line.

    Args:
        path: The file or folder. An empty folder has no captions.

    Raises:
        UserError: A file is missing, malformed or without captions, or the folder has a folder.
    """
    if not path.is_dir():
        return _read_file(path)
    entries = sorted(entry for entry in path.iterdir() if entry.name != _README and not entry.name.startswith("."))
    folders = [str(entry) for entry in entries if entry.is_dir()]
    if folders:
        raise UserError(f"{summarize(folders)}: is a folder. Put its files into {path} itself.")
    return [caption for entry in entries for caption in _read_file(entry)]


def _read_file(path: Path) -> list[TextCaption]:
    if path.name.removesuffix(".gz").endswith(".json"):
        images = coco.parse(path, ".").images
        captions = [TextCaption(caption.text, image.file) for image in images for caption in image.captions]
    elif (rows := flickr8k.read_rows(path)) is not None:
        captions = _from_rows(path, rows)
    else:
        captions = _from_lines(path)
    captions = [TextCaption(text, caption.image) for caption in captions if (text := caption.text.strip())]
    if not captions:
        raise UserError(f"{path}: has no captions. Add captions, or set train.text to null.")
    return captions


def _from_rows(path: Path, rows: Iterable[flickr8k.Row]) -> list[TextCaption]:
    captions, faults = [], []
    for row in rows:
        if row.caption is None:
            faults.append(f"{path}:{row.line} ({row.name})")
        else:
            captions.append(TextCaption(row.caption, row.name or None))
    if faults:
        raise UserError(f"rows without a readable caption: {summarize(faults)}. Fix these rows.")
    return captions


def _from_lines(path: Path) -> list[TextCaption]:
    lines = read_text(path).splitlines()
    for line_number, line in enumerate(lines, start=1):
        # Read as captions, the rows of a table would hide the names of val and test images.
        if _IMAGE_ROW.match(line):
            raise UserError(
                f"{path}:{line_number}: begins with the name of an image, but the first line is not the header"
                " 'image,caption'. Add the header, or remove the names."
            )
    return [TextCaption(line) for line in lines]
