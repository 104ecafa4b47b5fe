"""Caption files in COCO's formats: results to score, and annotations to score them against."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from pipeline.artifacts import read_json
from pipeline.captions.records import read_records
from pipeline.errors import UserError
from pipeline.generation.caption_io import CAPTIONS_FILE

MAX_IDS = 5
"""Image ids that an error lists."""


class _CaptionEntry(TypedDict):
    image_id: int
    caption: str


class _ImageEntry(TypedDict):
    id: int


class _Annotations(TypedDict):
    images: NotRequired[list[_ImageEntry]]
    annotations: list[_CaptionEntry]


def read_results(path: Path) -> dict[int, str]:
    """Read captions from a COCO results file.

    Args:
        path: A file `[{"image_id": 1, "caption": "a dog"}, ...]`, whose other keys are ignored, or a folder written by
            `generate`.

    Returns:
        The caption of each image, by image id.

    Raises:
        UserError: The file is missing or malformed, is empty, or has two captions of an image.
    """
    path = path / CAPTIONS_FILE if path.is_dir() else path
    remedy = 'Name a COCO results file: [{"image_id": 1, "caption": "a dog"}, ...].'
    captions: dict[int, str] = {}
    indices: dict[int, int] = {}
    for index, entry in enumerate(read_json(path, list[_CaptionEntry], remedy)):
        image_id = entry["image_id"]
        if image_id in captions:
            raise UserError(
                f"{path}: [{index}]: second caption of image {image_id}, after [{indices[image_id]}]. "
                "Keep one caption per image."
            )
        captions[image_id], indices[image_id] = entry["caption"], index
    if not captions:
        raise UserError(f"{path}: no captions. {remedy}")
    return captions


def read_references(path: Path) -> dict[int, list[str]]:
    """Read references from COCO annotations.

    Args:
        path: A file `{"annotations": [{"image_id": 1, "caption": "a dog"}, ...]}`, whose other keys are ignored, or a
            folder written by `prepare`.

    Returns:
        The references of each image, by image id; empty for images that have no annotation but are listed in `images`.

    Raises:
        UserError: The file is missing or malformed.
    """
    if path.is_dir():
        return {record.image_id: list(record.captions) for record in read_records(path)}
    remedy = 'Name a COCO annotations file: {"annotations": [{"image_id": 1, "caption": "a dog"}, ...]}.'
    document = read_json(path, _Annotations, remedy)
    references: dict[int, list[str]] = {image["id"]: [] for image in document.get("images", [])}
    for entry in document["annotations"]:
        references.setdefault(entry["image_id"], []).append(entry["caption"])
    return references


def check_references(
    results: Mapping[int, str], references: Mapping[int, list[str]], results_path: Path, references_path: Path
) -> None:
    """Check that every image with a result has a reference.

    Args:
        results: Captions by image id.
        references: References by image id.
        results_path: File of the results, for errors.
        references_path: File of the references, for errors.

    Raises:
        UserError: An image is not in the annotations, or has no caption there.
    """
    unknown_images = sorted(results.keys() - references.keys())
    if unknown_images:
        raise UserError(
            f"{results_path}: images that are not in {references_path} ({len(unknown_images)}): "
            f"{_list_ids(unknown_images)}. Name the annotations of the same images."
        )
    uncaptioned_images = sorted(image_id for image_id in results if not references[image_id])
    if uncaptioned_images:
        raise UserError(
            f"{references_path}: images of {results_path} without a caption ({len(uncaptioned_images)}): "
            f"{_list_ids(uncaptioned_images)}. Add captions, or remove the images from the results."
        )


def _list_ids(image_ids: Sequence[int]) -> str:
    return ", ".join(map(str, image_ids[:MAX_IDS])) + (", ..." if len(image_ids) > MAX_IDS else "")
