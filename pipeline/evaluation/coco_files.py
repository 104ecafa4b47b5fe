"""Caption files to score: COCO results or the output of `gridcap predict --json`, and COCO annotations."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NotRequired

from typing_extensions import TypedDict

from pipeline.artifacts import read_bytes, read_json, read_json_lines
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
    file_name: NotRequired[str | None]
    subset: NotRequired[str | None]
    domain: NotRequired[str | None]


class _Prediction(TypedDict):
    image: str
    caption: str


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
    subsets: dict[int, str] = field(default_factory=dict)
    """Subset of each image that is in one, by image id."""
    files: dict[int, str] = field(default_factory=dict)
    """Path or name of each image file that is known, by image id."""


def read_results(path: Path, references: References) -> dict[int, str]:
    """Read captions from a COCO results file, or from the output of `gridcap predict --json`.

    Args:
        path: A file `[{"image_id": 1, "caption": "a dog"}, ...]`, or with a line `{"image": "a.jpg", "caption": "a
            dog"}` per image, whose other keys are ignored, or a folder written by `generate`. The file may be
            compressed (`*.gz`).
        references: The references, which give the id of an image file by its name.

    Returns:
        The caption of each image, by image id.

    Raises:
        UserError: The file is missing or malformed, is empty, or has two captions of an image, or no or several images
            of the references have the name of an image file.
    """
    path = path / CAPTIONS_FILE if path.is_dir() else path
    remedy = 'Name a COCO results file: [{"image_id": 1, "caption": "a dog"}, ...].'
    captions: dict[int, str] = {}
    locations: dict[int, str] = {}
    for location, image_id, caption in _read_captions(path, references, remedy):
        if image_id in captions:
            raise UserError(
                f"{path}: {location}: second caption of image {image_id}, after {locations[image_id]}. "
                "Keep one caption per image."
            )
        captions[image_id], locations[image_id] = caption, location
    if not captions:
        raise UserError(f"{path}: no captions. {remedy}")
    return captions


def _read_captions(path: Path, references: References, remedy: str) -> Iterator[tuple[str, int, str]]:
    """Yield location, image id and text of each caption."""
    if not read_bytes(path, remedy).lstrip().startswith(b'{"image":'):
        for index, entry in enumerate(read_json(path, list[_CaptionEntry], remedy)):
            yield f"[{index}]", entry["image_id"], entry["caption"]
        return
    ids_by_name: dict[str, list[int]] = {}
    for image_id, file in references.files.items():
        ids_by_name.setdefault(PurePath(file).name, []).append(image_id)
    for prediction in read_json_lines(path, _Prediction, remedy):
        image_ids = ids_by_name.get(PurePath(prediction["image"]).name, [])
        if len(image_ids) != 1:
            raise UserError(
                f"{path}: {prediction['image']}: {len(image_ids) or 'no'} images of the references have this file name"
                f"{f': ids {_list_ids(image_ids)}' if image_ids else ''}. Name the references of the same images."
            )
        yield prediction["image"], image_ids[0], prediction["caption"]


def read_references(path: Path) -> References:
    """Read references from COCO annotations.

    Args:
        path: A file `{"annotations": [{"image_id": 1, "caption": "a dog"}, ...]}`, whose other keys are ignored except
            `is_precanned` and `is_rejected` of VizWiz and, in `images`, `file_name`, `subset` and the `domain` of
            nocaps, or a folder written by `prepare`. The file may be compressed (`*.gz`).

    Raises:
        UserError: The file is missing or malformed.
    """
    if path.is_dir():
        records = read_records(path)
        return References(
            captions={record.image_id: list(record.captions) for record in records},
            subsets={record.image_id: record.subset for record in records if record.subset is not None},
            files={record.image_id: record.file for record in records},
        )
    remedy = 'Name a COCO annotations file: {"annotations": [{"image_id": 1, "caption": "a dog"}, ...]}.'
    document = read_json(path, _Annotations, remedy)
    images = document.get("images", [])
    captions: dict[int, list[str]] = {image["id"]: [] for image in images}
    left_out: list[int] = []
    for entry in document["annotations"]:
        if is_accepted(entry):
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
        else:
            left_out.append(entry["image_id"])
    unscored_images = frozenset(image_id for image_id in left_out if not captions.get(image_id))
    for image_id in unscored_images:
        captions.pop(image_id, None)
    return References(
        captions=captions,
        num_left_out=len(left_out),
        unscored_images=unscored_images,
        subsets={image["id"]: subset for image in images if (subset := image.get("subset", image.get("domain")))},
        files={image["id"]: file for image in images if (file := image.get("file_name"))},
    )


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
