"""What the user names on the command line: pictures, folders of pictures, or one on standard input."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.errors import UserError

STANDARD_INPUT = "-"

_NOT_READ = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF"}
"""Formats of which Pillow knows no more than the suffix, or how to write them."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """A picture that the user named."""

    name: str
    """Its path, or `-`."""
    source: Path | bytes


def find_inputs(names: Sequence[str]) -> list[Input]:
    """Find the pictures that names stand for, in their order; a folder stands for all below it, sorted by path.

    In a folder, pictures are the files with the suffix of a format that Pillow reads. What is named itself, and a
    folder below it that cannot be listed, are taken as they are: reading them will tell. Raises `UserError` for a URL,
    an empty name and a folder without pictures.
    """
    return [found for name in names for found in _find(name)]


def _find(name: str) -> Iterator[Input]:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        raise UserError(
            f"{name}: is a URL, and nothing is fetched from the network; save the picture and name its file"
        )
    if not name:
        raise UserError("an empty name stands for no picture; name a picture, a folder, or - for standard input")
    path = Path(name)
    if name == STANDARD_INPUT:
        yield Input(name=name, source=sys.stdin.buffer.read())
    elif os.path.isdir(path):  # which takes what is out of reach for no folder, where Path raises
        pictures = sorted(_pictures(path))
        if not pictures:
            raise UserError(f"{name}: this folder holds no picture; name a picture, or a folder that has some")
        yield from (Input(name=str(picture), source=picture) for picture in pictures)
    else:
        yield Input(name=name, source=path)


def _pictures(folder: Path) -> Iterator[Path]:
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind not in _NOT_READ}
    closed: list[Path] = []
    for above, folders, files in os.walk(folder, onerror=lambda error: closed.append(Path(error.filename))):
        folders[:] = (name for name in folders if not name.startswith("."))
        for path in (Path(above, name) for name in files if not name.startswith(".")):
            # What is there and no file, such as a pipe, would be waited for without end.
            if path.suffix.lower() in suffixes and (os.path.isfile(path) or not os.path.exists(path)):
                yield path
    yield from closed
