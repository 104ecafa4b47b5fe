"""Section `dataset` of the params, and the checks that turn a dataset in any format into records."""

import errno
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pipeline.artifacts import require_watched
from pipeline.captions.leaks import count_caption_images, find_leaked_images, shared_captions
from pipeline.captions.records import SPLITS, Policy, Record, Split, escapes_root
from pipeline.captions.sources import coco, flickr8k, karpathy
from pipeline.captions.sources.image_digests import image_md5s
from pipeline.captions.sources.parsed_file import (
    ParsedFile,
    ParsedImage,
    SourceCaption,
    has_control_characters,
    id_from_path,
    locate_control_characters,
    require_relative,
)
from pipeline.captions.sources.splits import Splits, assign_splits
from pipeline.errors import UserError, summarize
from pipeline.params import DEPENDENCY, params_section

logger = logging.getLogger("gridcap")

Format = Literal["coco", "flickr8k", "karpathy"]

_PARSERS: dict[Format, Callable[[Path, str], ParsedFile]] = {
    "coco": coco.parse,
    "flickr8k": flickr8k.parse,
    "karpathy": karpathy.parse,
}
_SKIPPABLE_FAULTS = {
    "missing_images": "missing image files",
    "unmatched_captions": "captions of unknown images",
    "malformed_rows": "rows without all columns",
    "empty_captions": "empty captions",
    "control_characters": "captions with control characters",
    "uncaptioned_images": "images without captions",
}
_MISSING_VALUES = frozenset({"nan", "null", "none", "n/a", "#n/a", "<na>"})
"""What other programs write for a missing caption, in lowercase."""


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
    """Format of the caption files; flickr8k reads Kaggle's files of Flickr8k and Flickr30k and the original token
    files."""
    root: Annotated[Path, DEPENDENCY]
    """Dataset folder, absolute or relative to params.yaml."""
    images: str
    """Image folder below root; `.` for root itself."""
    captions: tuple[CaptionFile, ...]
    """Caption files, whose images form one dataset."""
    splits: Splits | None
    """Method to split images whose caption file sets no split; null if every image has a split."""
    missing_images: Policy
    """Policy for missing image files: error, or skip the images and count them."""
    bad_images: Policy
    """Policy for image files that cannot be decoded: error, or skip the images in all later stages and count them."""
    bad_captions: Policy
    """Policy for empty captions, captions with control characters, rows without all columns, captions of unknown images
    and images without captions: error, or skip and count them."""

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
    num_leaked_images: dict[Split, int]
    """Number of images, by split, whose file has the same bytes as an image of another split."""
    num_shared_captions: int
    """Number of distinct captions that many images share: at least 5 and 1% of all images."""
    max_images_per_caption: int
    """Most images that share one caption."""


def prepare(params: DatasetParams) -> tuple[list[Record], PreparedCounts, dict[str, str]]:
    """Read a dataset, split it and check it. Image files must exist; those that DVC has hashed are not read.

    Returns:
        The records, unordered, their counts, and the MD5 of each image file.

    Raises:
        UserError: A file is missing or malformed, DVC would not notice its changes, or the dataset has a fault that
            `params` do not skip, or no images.
    """
    for folder in (params.root, params.image_dir):
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder. Put the dataset there, or correct dataset.root and dataset.images."
            )
    split_files = params.splits.files if params.splits else ()
    files = (*(caption_file.file for caption_file in params.captions), *split_files)
    require_watched(params.root, (params.root / name for name in files))
    images, unmatched_captions, malformed_rows = _parse_files(params)
    _check_paths(params, images)
    _check_unique(params, images, lambda image: image.image_id, "image id")
    _check_unique(params, images, lambda image: image.file, "image path")
    assignment = assign_splits(images, params.splits, params.root)
    assigned = [image for image in images if image.file in assignment.split_by_file]
    split_by_id = {image.image_id: assignment.split_by_file[image.file] for image in assigned}
    present, missing = _locate_files(params.image_dir, assigned)
    require_watched(params.root, (params.image_dir / image.file for image in [*present, *missing]))
    _check_unique(params, present, lambda image: image.file, "image path")
    records = [record for image in present if (record := _make_record(image, split_by_id[image.image_id]))]
    recorded_files = {record.file for record in records}
    uncaptioned = [image for image in present if image.file not in recorded_files]
    captions = [caption for image in present for caption in image.captions]

    faults = {
        "missing_images": [_describe(image) for image in missing],
        "unmatched_captions": unmatched_captions,
        "malformed_rows": malformed_rows,
        "empty_captions": [caption.location for caption in captions if not caption.text.strip()],
        "control_characters": locate_control_characters(captions),
        "uncaptioned_images": [
            *assignment.unknown_images,
            *(_describe(image) for image in uncaptioned if not _has_unaccepted(image)),
        ],
    }
    _apply_policies(params, faults)
    _warn_of_missing_values(captions)
    md5s = image_md5s(params.image_dir, [record.file for record in records])
    counts = PreparedCounts(
        num_images=_sum_by_split((record.split, 1) for record in records),
        num_captions=_sum_by_split((record.split, len(record.captions)) for record in records),
        num_unassigned_images=len(images) - len(assigned),
        num_skipped={
            **{fault: len(locations) for fault, locations in faults.items()},
            "precanned_captions": sum(image.num_precanned_captions for image in present),
            "rejected_captions": sum(image.num_rejected_captions for image in present),
            "images_without_accepted_captions": sum(map(_has_unaccepted, uncaptioned)),
        },
        **_count_leaks(params.image_dir, records, md5s),
    )
    _check_splits(params, counts, assignment.unknown_images)
    return records, counts, md5s


def _count_leaks(image_dir: Path, records: Sequence[Record], md5s: Mapping[str, str]) -> dict[str, Any]:
    """Count leaks, as in `PreparedCounts`, and warn of them."""
    leaks = find_leaked_images(image_dir, records, md5s)
    if leaks:
        locations = [" = ".join(f"{record.file} ({record.split})" for record in group) for group in leaks]
        logger.warning(
            "image files that are in more than one split (%d): %s. Scores on these images are not of unseen images."
            " Remove the copies, or assign them to one split.",
            len(leaks),
            summarize(locations),
        )
    num_images = count_caption_images(records)
    shared = shared_captions(num_images, len(records))
    if shared:
        logger.warning(
            "captions that many images share (%d): %s. Remove them if they do not describe the images.",
            len(shared),
            summarize([f"{caption!r} ({count} images)" for caption, count in shared]),
        )
    return {
        "num_leaked_images": _sum_by_split((record.split, 1) for group in leaks for record in group),
        "num_shared_captions": len(shared),
        "max_images_per_caption": max(num_images.values(), default=0),
    }


def _parse_files(params: DatasetParams) -> tuple[list[ParsedImage], list[str], list[str]]:
    """Return the images, the unmatched captions and the malformed rows of all caption files."""
    images, unmatched_captions, malformed_rows = [], [], []
    for caption_file in params.captions:
        parsed = _PARSERS[params.format](params.root / caption_file.file, caption_file.folder)
        images += [replace(image, split=caption_file.split or image.split) for image in parsed.images]
        unmatched_captions += parsed.unmatched_captions
        malformed_rows += parsed.malformed_rows
    return _resolve_name_ids(images), unmatched_captions, malformed_rows


def _resolve_name_ids(images: Sequence[ParsedImage]) -> list[ParsedImage]:
    """Derive ids from whole paths for images that have the same name in several folders."""
    counts = Counter(PurePosixPath(image.file).name for image in images if image.has_name_id)
    return [
        replace(image, image_id=id_from_path(image.file))
        if image.has_name_id and counts[PurePosixPath(image.file).name] > 1
        else image
        for image in images
    ]


def _locate_files(image_dir: Path, images: Sequence[ParsedImage]) -> tuple[list[ParsedImage], list[ParsedImage]]:
    """Find the image files on disk.

    Args:
        image_dir: Folder of the image files.
        images: Images whose `file` may differ from the name on disk in Unicode normalization.

    Returns:
        The images that exist, with `file` as on disk, and the missing images.
    """
    names_by_folder: dict[Path, dict[str, list[str]]] = {}

    def names_on_disk(folder: Path, name: str) -> list[str]:
        if folder not in names_by_folder:
            names = names_by_folder[folder] = {}
            for entry in os.listdir(folder) if folder.is_dir() else ():
                names.setdefault(unicodedata.normalize("NFC", entry), []).append(entry)
        return names_by_folder[folder].get(unicodedata.normalize("NFC", name), [])

    def locate(file: str) -> str | None:
        if _is_file(image_dir / file):
            return file
        if file.isascii():
            return None
        located = PurePosixPath()
        for part in PurePosixPath(file).parts:
            names = names_on_disk(image_dir / located, part)
            if part not in names and len(names) != 1:
                return None
            located /= part if part in names else names[0]
        return str(located) if _is_file(image_dir / located) else None

    present, missing = [], []
    for image in images:
        file = locate(image.file)
        if file is None:
            missing.append(image)
        else:
            present.append(image if file == image.file else replace(image, file=file))
    return present, missing


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def _has_unaccepted(image: ParsedImage) -> bool:
    return image.num_precanned_captions + image.num_rejected_captions > 0


def _warn_of_missing_values(captions: Iterable[SourceCaption]) -> None:
    locations = [
        f"{caption.location} ({text})"
        for caption in captions
        if (text := caption.text.strip()).lower() in _MISSING_VALUES
    ]
    if locations:
        logger.warning(
            "captions that look like missing values (%d): %s. They are kept as words.",
            len(locations),
            summarize(locations),
        )


def _make_record(image: ParsedImage, split: Split) -> Record | None:
    captions = tuple(
        text
        for caption in image.captions
        if (text := caption.text.strip()) and not has_control_characters(caption.text)
    )
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


def _check_splits(params: DatasetParams, counts: PreparedCounts, unknown_images: Sequence[str]) -> None:
    """Warn of splits without images, which stages that need them refuse.

    Raises:
        UserError: All splits are without images.
    """
    empty = [split for split in SPLITS if not counts.num_images[split]]
    if not empty:
        return
    message = (
        f"{params.root}: no images in {' and '.join(empty)} (images: {counts.num_images}, unassigned: "
        f"{counts.num_unassigned_images}, skipped: {counts.num_skipped})."
        + (f" Entries of split files that match no image: {summarize(unknown_images)}." if unknown_images else "")
    )
    if len(empty) == len(SPLITS):
        raise UserError(
            f"{message} Assign images to the splits with split in dataset.captions, or with dataset.splits."
        )
    logger.warning("%s Stages that need this split will stop.", message)
