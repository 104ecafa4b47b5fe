"""Captions without images, and the removal of what belongs to val or test.

A text has no image to be held out with. So a caption is left out if it has the same letters and digits as a caption of
val or test, or if the file names its image and that image, or another caption of it, is one of val or test.
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from pipeline.captions.records import Record

_COCO_PREFIX = re.compile(r"coco_[a-z]+20\d\d_")


class TextCaption(NamedTuple):
    """A caption without an image."""

    text: str
    """As in its file, stripped of surrounding whitespace."""
    image: str | None = None
    """File name of the image that it describes; None where the file does not name one."""


class HeldOutImages:
    """File names and captions of the images of val and test."""

    def __init__(self) -> None:
        """Start without images."""
        self._names: set[str] = set()
        self._captions: set[str] = set()

    def add(self, record: Record) -> None:
        """Add an image of val or test."""
        self._names.add(_name_key(record.file))
        self._captions.update(filter(None, map(_caption_key, record.captions)))

    def exclude_from(self, captions: Sequence[TextCaption]) -> list[TextCaption]:
        """Return the captions of a text that belong to none of the images, as far as names and captions can tell."""
        is_held_out = [
            _caption_key(caption.text) in self._captions
            or (caption.image is not None and _name_key(caption.image) in self._names)
            for caption in captions
        ]
        images = {caption.image for caption, held_out in zip(captions, is_held_out, strict=True) if held_out} - {None}
        return [
            caption
            for caption, held_out in zip(captions, is_held_out, strict=True)
            if not held_out and caption.image not in images
        ]


def _name_key(name: str) -> str:
    """Return the name of an image file without folders, extension, case and the prefix of COCO 2014."""
    return _COCO_PREFIX.sub("", PurePath(name.replace("\\", "/")).stem.casefold())


def _caption_key(caption: str) -> str:
    """Return the letters and digits of a caption, without case."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", caption).casefold()))
