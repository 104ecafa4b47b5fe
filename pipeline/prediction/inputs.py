"""Images named on the command line: files, folders, or standard input."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.errors import UserError
from pipeline.features.images import NAMED_SUFFIXES

STANDARD_INPUT = "-"

_UNREADABLE_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF"}
"""Formats whose suffixes Pillow registers without being able to read them."""


@dataclass(frozen=True, kw_only=True)
class NamedImage:
    """An image to caption."""

    name: str
    """Path of the file, or `-` for standard input."""
    source: Path | bytes
    """Path of the file, or content of standard input."""


def find_inputs(arguments: Sequence[str]) -> list[NamedImage]:
    """Find the images that command-line arguments name, in their order.

    A folder is searched recursively for files with a suffix that Pillow can read or that is in `NAMED_SUFFIXES`, sorted
    by path. Other arguments and folders that cannot be listed are not checked here; reading them reports the error.

    Raises:
        UserError: An argument is a URL, an empty string, or a folder without images.
    """
    return [image for argument in arguments for image in _find(argument)]


def _find(argument: str) -> Iterator[NamedImage]:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", argument):
        raise UserError(f"{argument}: URLs are not supported. Download the image first.")
    if not argument:
        raise UserError("IMAGE: is an empty string. Name an image, a folder, or - for standard input.")
    path = Path(argument)
    if argument == STANDARD_INPUT:
        yield NamedImage(name=argument, source=sys.stdin.buffer.read())
    elif os.path.isdir(path):  # unlike Path.is_dir, False for inaccessible paths instead of an exception
        files = sorted(_image_files(path))
        if not files:
            raise UserError(f"{argument}: contains no images. Name an image, or a folder with images.")
        yield from (NamedImage(name=str(file), source=file) for file in files)
    else:
        yield NamedImage(name=argument, source=path)


def _image_files(folder: Path) -> Iterator[Path]:
    """Yield the image files below a folder, and the folders below it that cannot be listed."""
    suffixes = NAMED_SUFFIXES | {
        suffix
        for suffix, image_format in Image.registered_extensions().items()
        if image_format not in _UNREADABLE_FORMATS
    }
    unlisted: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=lambda error: unlisted.append(Path(error.filename))):
        folders[:] = (name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in files if not name.startswith(".")):
            # Reading from a pipe would block; broken links are kept and reported when they are read.
            if path.suffix.lower() in suffixes and (os.path.isfile(path) or not os.path.exists(path)):
                yield path
    yield from unlisted
