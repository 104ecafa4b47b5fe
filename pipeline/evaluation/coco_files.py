"""Caption files in COCO's formats: results to score, and annotations to score them against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from pipeline.artifacts import read_json
from pipeline.captions.records import read_records
from pipeline.captions.sources.parsed_file import IntegerId, is_accepted
from pipeline.errors import UserError
from pipeline.generation.caption_io import CAPTIONS_FILE

MAX_IDS = 5
"""Image ids that an error lists."""


class _CaptionEntry(TypedDict):
    image_id: IntegerId
    caption: str


class _AnnotationEntry(_CaptionEntry):
    is_precanned: NotRequired[bool | None]
    is_rejected: NotRequired[bool | None]


class _ImageEntry(TypedDict):
    id: IntegerId


class _Annotations(TypedDict):
    images: NotRequired[list[_ImageEntry]]
    annotations: list[_AnnotationEntry]


@dataclass(frozen=True, kw_only=True)
class References:
    """The references of an annotations file."""

    captions: dict[int, list[str]]
    """References by image id; empty for images that have no annotation but are listed in `images`."""
    num_left_out: int = 0
    """Number of captions that VizWiz marks as precanned or rejected, not in `captions`."""
    unscored_images: frozenset[int] = frozenset()
    """Ids of images of which all captions are left out, not in `captions`."""


def read_results(path: Path) -> dict[int, str]:
    """Read captions from a COCO results file.

    Args:
        path: A file `[{"image_id": 1, "caption": "a dog"}, ...]`, whose other keys are ignored, or a folder written by
            `generate`. The file may be compressed (`*.gz`).

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


def read_references(path: Path) -> References:
    """Read references from COCO annotations.

    Args:
        path: A file `{"annotations": [{"image_id": 1, "caption": "a dog"}, ...]}`, whose other keys are ignored except
            `is_precanned` and `is_rejected` of VizWiz, or a folder written by `prepare`. The file may be compressed
            (`*.gz`).

    Raises:
        UserError: The file is missing or malformed.
    """
    if path.is_dir():
        return References(captions={record.image_id: list(record.captions) for record in read_records(path)})
    remedy = 'Name a COCO annotations file: {"annotations": [{"image_id": 1, "caption": "a dog"}, ...]}.'
    document = read_json(path, _Annotations, remedy)
    captions: dict[int, list[str]] = {image["id"]: [] for image in document.get("images", [])}
    left_out: list[int] = []
    for entry in document["annotations"]:
        if is_accepted(entry):
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
        else:
            left_out.append(entry["image_id"])
    unscored_images = frozenset(image_id for image_id in left_out if not captions.get(image_id))
    for image_id in unscored_images:
        captions.pop(image_id, None)
    return References(captions=captions, num_left_out=len(left_out), unscored_images=unscored_images)


def select_scored(
    results: Mapping[int, str], references: References, results_path: Path, references_path: Path
) -> dict[int, str]:
    """Select the results to score, and check that each of them has a reference.

    Args:
        results: Captions by image id.
        references: The references.
        results_path: File of the results, for errors.
        references_path: File of the references, for errors.

    Returns:
        The results of all images but `references.unscored_images`.

    Raises:
        UserError: An image is not in the annotations, or has no caption there, or no image can be scored.
    """
    scored = {image_id: caption for image_id, caption in results.items() if image_id not in references.unscored_images}
    if not scored:
        raise UserError(
            f"{references_path}: all captions of the images of {results_path} are precanned or rejected. "
            "Name annotations with accepted captions."
        )
    unknown_images = sorted(scored.keys() - references.captions.keys())
    if unknown_images:
        raise UserError(
            f"{results_path}: images that are not in {references_path} ({len(unknown_images)}): "
            f"{_list_ids(unknown_images)}. Name the annotations of the same images."
        )
    uncaptioned_images = sorted(image_id for image_id in scored if not references.captions[image_id])
    if uncaptioned_images:
        raise UserError(
            f"{references_path}: images of {results_path} without a caption ({len(uncaptioned_images)}): "
            f"{_list_ids(uncaptioned_images)}. Add captions, or remove the images from the results."
        )
    return scored


def _list_ids(image_ids: Sequence[int]) -> str:
    return ", ".join(map(str, image_ids[:MAX_IDS])) + (", ..." if len(image_ids) > MAX_IDS else "")
