"""Section `dataset` of the params, and the checks that turn a dataset in any format into records."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.captions.records import SPLITS, Record, Split
from pipeline.captions.sources import coco, flickr8k, karpathy
from pipeline.captions.sources.parsed_file import ParsedFile, ParsedImage, escapes_root, require_relative
from pipeline.captions.sources.splits import Splits, assign_splits
from pipeline.errors import UserError, summarize
from pipeline.params import params_section

Format = Literal["coco", "flickr8k", "karpathy"]
Policy = Literal["error", "skip"]

_PARSERS: dict[Format, Callable[[Path, str], ParsedFile]] = {
    "coco": coco.parse,
    "flickr8k": flickr8k.parse,
    "karpathy": karpathy.parse,
}
_SKIPPABLE_FAULTS = {
    "missing_images": "missing image files",
    "unmatched_captions": "captions of unknown images",
    "empty_captions": "empty captions",
    "uncaptioned_images": "images without captions",
}


@params_section
class CaptionFile:
    """One caption file and the location of its images."""

    file: str
    """Path below dataset.root."""
    folder: str
    """Folder of the file's images, below dataset.images; `.` for dataset.images itself."""
    split: Split | None
    """Split of all images of the file; null uses the splits in the file (karpathy) or dataset.splits."""

    def __post_init__(self) -> None:
        require_relative(self.file, self.folder)


@params_section
class DatasetParams:
    """Section `dataset`: format and location of images and captions, and how strictly to check them."""

    format: Format
    """Format of the caption files; flickr8k reads both Kaggle's CSV and the original token file."""
    root: Path
    """Dataset folder, absolute or relative to params.yaml."""
    images: str
    """Image folder below root; `.` for root itself."""
    captions: tuple[CaptionFile, ...]
    """Caption files, whose images form one dataset."""
    splits: Splits | None
    """Method to split images whose caption file sets no split; null if every image has a split."""
    missing_images: Policy
    """Policy for missing image files: error, or skip the images and count them."""
    bad_captions: Policy
    """Policy for empty captions, captions of unknown images and images without captions: error, or skip and count
    them."""

    def __post_init__(self) -> None:
        if not self.captions:
            raise ValueError("captions must list at least one caption file")
        require_relative(self.images)

    @property
    def image_dir(self) -> Path:
        """Folder of the image files."""
        return self.root / self.images


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedCounts:
    """Counts of images and captions: the metrics of `prepare`."""

    num_images: dict[Split, int]
    """Number of images by split."""
    num_captions: dict[Split, int]
    """Number of captions by split."""
    num_unassigned_images: int
    """Number of images that are in no split."""
    num_skipped: dict[str, int]
    """Number of skipped images or captions by reason."""


def prepare(params: DatasetParams) -> tuple[list[Record], PreparedCounts]:
    """Read a dataset, split it and check it. Image files must exist but are not opened.

    Returns:
        The records, unordered, and their counts.

    Raises:
        UserError: A file is missing or malformed, or the dataset has a fault that `params` do not skip.
    """
    for folder in (params.root, params.image_dir):
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder. Put the dataset there, or correct dataset.root and dataset.images."
            )
    images, unmatched_captions = _parse_files(params)
    _check_paths(params, images)
    _check_unique(params, images, lambda image: image.image_id, "image id")
    _check_unique(params, images, lambda image: image.file, "image path")
    assignment = assign_splits(images, params.splits, params.root)
    assigned = [image for image in images if image.file in assignment.split_by_file]
    missing_files = {image.file for image in assigned if not (params.image_dir / image.file).is_file()}
    present = [image for image in assigned if image.file not in missing_files]
    records = [record for image in present if (record := _make_record(image, assignment.split_by_file[image.file]))]
    recorded_files = {record.file for record in records}

    faults = {
        "missing_images": [_describe(image) for image in assigned if image.file in missing_files],
        "unmatched_captions": unmatched_captions,
        "empty_captions": [
            caption.location for image in present for caption in image.captions if not caption.text.strip()
        ],
        "uncaptioned_images": [
            *assignment.unknown_images,
            *(_describe(image) for image in present if image.file not in recorded_files),
        ],
    }
    _apply_policies(params, faults)
    counts = PreparedCounts(
        num_images=_sum_by_split((record.split, 1) for record in records),
        num_captions=_sum_by_split((record.split, len(record.captions)) for record in records),
        num_unassigned_images=len(images) - len(assigned),
        num_skipped={fault: len(locations) for fault, locations in faults.items()},
    )
    _check_splits_not_empty(params, counts)
    return records, counts


def _parse_files(params: DatasetParams) -> tuple[list[ParsedImage], list[str]]:
    images, unmatched_captions = [], []
    for caption_file in params.captions:
        parsed = _PARSERS[params.format](params.root / caption_file.file, caption_file.folder)
        images += [replace(image, split=caption_file.split or image.split) for image in parsed.images]
        unmatched_captions += parsed.unmatched_captions
    return images, unmatched_captions


def _make_record(image: ParsedImage, split: Split) -> Record | None:
    captions = tuple(text for caption in image.captions if (text := caption.text.strip()))
    if not captions:
        return None
    return Record(
        image_id=image.image_id,
        file=image.file,
        split=split,
        captions=captions,
        subset=image.subset,
        objects=image.objects,
    )


def _describe(image: ParsedImage) -> str:
    return f"{image.file} ({image.location})"


def _sum_by_split(counts: Iterable[tuple[Split, int]]) -> dict[Split, int]:
    total = Counter[Split]()
    for split, count in counts:
        total[split] += count
    return {split: total[split] for split in SPLITS}


def _check_paths(params: DatasetParams, images: Sequence[ParsedImage]) -> None:
    faults = [f"{image.file!r} ({image.location})" for image in images if escapes_root(image.file)]
    if faults:
        raise UserError(
            f"{params.image_dir}: image paths outside this folder: {summarize(faults)}. Correct the caption file."
        )


def _check_unique(
    params: DatasetParams, images: Sequence[ParsedImage], key: Callable[[ParsedImage], int | str], key_name: str
) -> None:
    first_seen: dict[int | str, ParsedImage] = {}
    faults = []
    for image in images:
        first = first_seen.setdefault(key(image), image)
        if first is not image:
            faults.append(f"{key(image)} of {_describe(first)} and {_describe(image)}")
    if faults:
        raise UserError(
            f"{params.root}: two images with the same {key_name}: {summarize(faults)}. Remove or rename one of the two."
        )


def _apply_policies(params: DatasetParams, faults: Mapping[str, Sequence[str]]) -> None:
    """Raise an error for the first kind of fault that the params do not skip.

    Args:
        params: Section `dataset`.
        faults: Locations of the faults, by kind.

    Raises:
        UserError: There is a fault whose policy is `error`.
    """
    for fault, locations in faults.items():
        if fault == "missing_images":
            key, policy = "dataset.missing_images", params.missing_images
        else:
            key, policy = "dataset.bad_captions", params.bad_captions
        if locations and policy == "error":
            raise UserError(
                f"{params.root}: {_SKIPPABLE_FAULTS[fault]} ({len(locations)}): {summarize(locations)}."
                f" Fix the dataset, or set {key} to skip."
            )


def _check_splits_not_empty(params: DatasetParams, counts: PreparedCounts) -> None:
    empty = [split for split in SPLITS if not counts.num_images[split]]
    if empty:
        raise UserError(
            f"{params.root}: no images in {' and '.join(empty)} (images: {counts.num_images}, unassigned: "
            f"{counts.num_unassigned_images}, skipped: {counts.num_skipped}). Assign images to every split with split "
            "in dataset.captions, or with dataset.splits."
        )
