"""COCO caption JSON, read through pycocotools."""

import contextlib
import os
from pathlib import Path
from typing import NotRequired

from pycocotools.coco import COCO
from typing_extensions import TypedDict

from pipeline.captions.records import Thing
from pipeline.captions.sources.parsed_file import Caption, Entry, ImageId, Source, join_relative, read_json
from pipeline.errors import UserError


class _Thing(TypedDict):
    attributes: dict[str, str]
    box: tuple[float, float, float, float]


class _Image(TypedDict):
    id: ImageId
    file_name: str
    width: NotRequired[int]
    height: NotRequired[int]
    subset: NotRequired[str | None]
    things: NotRequired[list[_Thing]]


class _Annotation(TypedDict):
    id: int
    image_id: int
    caption: str


class _Captions(TypedDict):
    images: list[_Image]
    annotations: list[_Annotation]


def read(path: Path, folder: str) -> Source:
    """Read one COCO caption file whose images lie in `folder` below the image folder.

    Besides COCO's own keys an entry of `images` may carry `subset` (a string) and `things`, a list of
    `{"attributes": {...}, "box": [left, top, width, height] in pixels}`. Raises `UserError` with the place
    where the file has another form.
    """
    content = read_json(path, _Captions, "COCO caption file")
    index = COCO()
    index.dataset = {"images": content["images"], "annotations": content["annotations"]}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        index.createIndex()
    return Source(
        # Not index.imgs: that keeps only the last of several images with one id.
        entries=[_entry(path, folder, image, index.imgToAnns[image["id"]]) for image in content["images"]],
        unmatched_captions=[
            f"{_place(path, annotation)} (image {annotation['image_id']})"
            for annotation in content["annotations"]
            if annotation["image_id"] not in index.imgs
        ],
    )


def _entry(path: Path, folder: str, image: _Image, annotations: list[_Annotation]) -> Entry:
    place = f"{path}, image {image['id']}"
    return Entry(
        image_id=image["id"],
        file=join_relative(folder, image["file_name"]),
        place=place,
        split=None,
        captions=tuple(Caption(one["caption"], _place(path, one)) for one in annotations),
        subset=image.get("subset"),
        things=tuple(_thing(place, image, thing) for thing in image.get("things", ())),
    )


def _thing(place: str, image: _Image, thing: _Thing) -> Thing:
    width, height = image.get("width", 0), image.get("height", 0)
    if width <= 0 or height <= 0:
        raise UserError(f"{place}: has boxes but its size is {width} x {height}; give width and height in pixels")
    x, y, w, h = thing["box"]
    return Thing(attributes=thing["attributes"], box=(x / width, y / height, w / width, h / height))


def _place(path: Path, annotation: _Annotation) -> str:
    return f"{path}, annotation {annotation['id']}"
