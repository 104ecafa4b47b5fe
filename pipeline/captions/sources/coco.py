"""Parser of COCO caption files (`captions_*.json`), indexed by pycocotools."""

import contextlib
import os
from pathlib import Path
from typing import NotRequired

from pycocotools.coco import COCO
from pydantic import FiniteFloat
from typing_extensions import TypedDict

from pipeline.artifacts import Int64, read_json
from pipeline.captions.records import AnnotatedObject
from pipeline.captions.sources.parsed_file import (
    REMEDY,
    ImageId,
    IntegerId,
    ParsedFile,
    ParsedImage,
    SourceCaption,
    is_accepted,
    join_relative,
)
from pipeline.errors import UserError


class _Object(TypedDict):
    attributes: dict[str, str]
    box: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]


class _Image(TypedDict):
    id: ImageId
    file_name: str
    width: NotRequired[Int64 | None]
    height: NotRequired[Int64 | None]
    subset: NotRequired[str | None]
    domain: NotRequired[str | None]
    objects: NotRequired[list[_Object]]


class _Annotation(TypedDict):
    id: NotRequired[int | str]
    image_id: IntegerId
    caption: NotRequired[str | None]
    is_precanned: NotRequired[bool | None]
    is_rejected: NotRequired[bool | None]


class _CocoFile(TypedDict):
    images: list[_Image]
    annotations: list[_Annotation]


def parse(path: Path, folder: str) -> ParsedFile:
    """Parse a COCO caption file.

    In addition to the keys of COCO, an entry of `images` may have `subset`, a string, and `objects`, a list of
    `{"attributes": {...}, "box": [left, top, width, height]}` with boxes in px. Without `subset`, the `domain` of
    nocaps is the subset. Captions that VizWiz marks with `is_precanned` or `is_rejected` are counted and left out.

    Args:
        path: The caption file.
        folder: Folder of its images, relative to the image folder.

    Raises:
        UserError: The file is missing or malformed.
    """
    content = read_json(path, _CocoFile, REMEDY)
    if content["annotations"] and not any("caption" in annotation for annotation in content["annotations"]):
        raise UserError(f"{path}: no annotation has a caption. Name a COCO file of captions, such as captions_*.json.")
    for index, annotation in enumerate(content["annotations"]):
        annotation.setdefault("id", f"[{index}]")
    index = COCO()
    index.dataset = {"images": content["images"], "annotations": content["annotations"]}
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
        index.createIndex()
    return ParsedFile(
        # Not index.imgs, which keeps only the last of several images with the same id.
        images=[_parse_image(path, folder, image, index.imgToAnns[image["id"]]) for image in content["images"]],
        unmatched_captions=[
            f"{_annotation_location(path, annotation)} (image {annotation['image_id']})"
            for annotation in content["annotations"]
            if annotation["image_id"] not in index.imgs
        ],
    )


def _parse_image(path: Path, folder: str, image: _Image, annotations: list[_Annotation]) -> ParsedImage:
    location = f"{path}: image {image['id']}"
    num_precanned = sum(bool(annotation.get("is_precanned")) for annotation in annotations)
    accepted = [annotation for annotation in annotations if is_accepted(annotation)]
    return ParsedImage(
        image_id=image["id"],
        file=join_relative(folder, image["file_name"]),
        location=location,
        split=None,
        captions=tuple(
            SourceCaption(annotation.get("caption") or "", _annotation_location(path, annotation))
            for annotation in accepted
        ),
        num_precanned_captions=num_precanned,
        num_rejected_captions=len(annotations) - len(accepted) - num_precanned,
        subset=image.get("subset", image.get("domain")),
        objects=tuple(_parse_object(location, image, item) for item in image.get("objects", ())),
    )


def _parse_object(location: str, image: _Image, item: _Object) -> AnnotatedObject:
    width, height = image.get("width") or 0, image.get("height") or 0
    if width <= 0 or height <= 0:
        raise UserError(f"{location}: has boxes, but its size is {width} x {height}. Set width and height in px.")
    x, y, w, h = item["box"]
    return AnnotatedObject(attributes=item["attributes"], box=(x / width, y / height, w / width, h / height))


def _annotation_location(path: Path, annotation: _Annotation) -> str:
    return f"{path}: annotation {annotation['id']}"
