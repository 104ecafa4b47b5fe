"""From a dataset in any known format to checked records."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.captions.records import SPLITS, Record, Split
from pipeline.captions.sources import coco, flickr8k, karpathy
from pipeline.captions.sources.parsed_file import Entry, Source, escapes_root, require_relative, some
from pipeline.captions.sources.splits import Splits, assign_splits
from pipeline.errors import UserError
from pipeline.params import params_section

Format = Literal["coco", "flickr8k", "karpathy"]
Policy = Literal["error", "skip"]

_READERS: dict[Format, Callable[[Path, str], Source]] = {
    "coco": coco.read,
    "flickr8k": flickr8k.read,
    "karpathy": karpathy.read,
}


@params_section
class CaptionFile:
    """One caption file."""

    file: str
    """Path below dataset.root."""
    folder: str
    """Folder below dataset.images in which the images that the file names lie; `.` for that folder itself."""
    split: Split | None
    """Split of all images of the file; null: as the file itself says (karpathy) or as dataset.splits says."""

    def __post_init__(self) -> None:
        require_relative(self.file, self.folder)


@params_section
class DatasetParams:
    """Section `dataset`: where the images and their captions are, and how strictly they are checked."""

    format: Format
    """Form of the caption files; flickr8k stands for both of that dataset's forms."""
    root: Path
    """Folder that holds all of the dataset, relative to the folder of params.yaml."""
    images: str
    """Folder of image files below root; `.` for root itself."""
    captions: tuple[CaptionFile, ...]
    """The caption files; several are joined."""
    splits: Splits | None
    """How images whose split no caption file gives are divided; null: every image has a split already."""
    missing_images: Policy
    """What an image file that is not there means: an error, or an image skipped and counted."""
    bad_captions: Policy
    """The same for empty captions, captions of unknown images and images without captions."""

    def __post_init__(self) -> None:
        if not self.captions:
            raise ValueError("captions must name at least one caption file")
        require_relative(self.images)

    @property
    def image_dir(self) -> Path:
        """Folder of the image files."""
        return self.root / self.images


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What became of the dataset's images and captions: the metrics of `prepare`."""

    images: dict[Split, int]
    captions: dict[Split, int]
    left_out: int
    """Images that have captions but that no split names."""
    skipped: dict[str, int]
    """Images or captions skipped, by the kind of fault."""


def prepare(params: DatasetParams) -> tuple[list[Record], Counts]:
    """Read a dataset, divide it and check it; returns its records, in no particular order, and their counts.

    Of an image only its presence is checked. Raises `UserError`, naming file and line or entry, for every
    fault that the params do not let pass.
    """
    images = params.image_dir
    for folder in (params.root, images):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; put the dataset there, or mend dataset.root and dataset.images")
    entries, unmatched_captions = _read(params)
    _refuse_names_that_lead_out(entries)
    _refuse_repeats(entries, lambda entry: entry.image_id, "image id")
    _refuse_repeats(entries, lambda entry: entry.file, "file")
    division = assign_splits(entries, params.splits, params.root)
    used = [entry for entry in entries if entry.file in division.split]

    missing = {entry.file: f"{entry.file} ({entry.place})" for entry in used if not (images / entry.file).is_file()}
    _allow(params.missing_images, list(missing.values()), f"{images}: images not found", "dataset.missing_images")
    empty, uncaptioned_images, records = [], list(division.unknown_images), []
    for entry in used:
        if entry.file in missing:
            continue
        empty += [caption.place for caption in entry.captions if not caption.text.strip()]
        if record := _record(entry, division.split[entry.file]):
            records.append(record)
        else:
            uncaptioned_images.append(f"{entry.file} ({entry.place})")
    _allow(
        params.bad_captions,
        unmatched_captions,
        "captions of images that the file does not list",
        "dataset.bad_captions",
    )
    _allow(params.bad_captions, empty, "empty captions", "dataset.bad_captions")
    _allow(params.bad_captions, uncaptioned_images, "images without captions", "dataset.bad_captions")
    counts = Counts(
        images=_by_split((record.split, 1) for record in records),
        captions=_by_split((record.split, len(record.captions)) for record in records),
        left_out=len(entries) - len(used),
        skipped={
            "missing_images": len(missing),
            "captions_of_unknown_images": len(unmatched_captions),
            "empty_captions": len(empty),
            "images_without_captions": len(uncaptioned_images),
        },
    )
    _refuse_empty_splits(params, counts)
    return records, counts


def _read(params: DatasetParams) -> tuple[list[Entry], list[str]]:
    entries, unmatched_captions = [], []
    for one in params.captions:
        source = _READERS[params.format](params.root / one.file, one.folder)
        unmatched_captions += source.unmatched_captions
        entries += [replace(entry, split=one.split or entry.split) for entry in source.entries]
    return entries, unmatched_captions


def _record(entry: Entry, split: Split) -> Record | None:
    captions = tuple(text for caption in entry.captions if (text := caption.text.strip()))
    if not captions:
        return None
    return Record(
        image_id=entry.image_id,
        file=entry.file,
        split=split,
        captions=captions,
        subset=entry.subset,
        things=entry.things,
    )


def _by_split(amounts: Iterable[tuple[Split, int]]) -> dict[Split, int]:
    total = Counter[Split]()
    for split, amount in amounts:
        total[split] += amount
    return {split: total[split] for split in SPLITS}


def _refuse_names_that_lead_out(entries: Sequence[Entry]) -> None:
    faults = [f"{entry.file!r} ({entry.place})" for entry in entries if escapes_root(entry.file)]
    if faults:
        raise UserError(f"file names must lie below the image folder, got {some(faults)}; mend them")


def _refuse_repeats(entries: Sequence[Entry], key: Callable[[Entry], int | str], what: str) -> None:
    first: dict[int | str, Entry] = {}
    faults = []
    for entry in entries:
        other = first.setdefault(key(entry), entry)
        if other is not entry:
            faults.append(f"{key(entry)} of {other.file} ({other.place}) and of {entry.file} ({entry.place})")
    if faults:
        raise UserError(f"two images have one {what}: {some(faults)}; remove or rename one of the two")


def _allow(policy: Policy, faults: Sequence[str], what: str, key: str) -> None:
    if faults and policy == "error":
        raise UserError(
            f"{what}, {len(faults)} in all: {some(faults)}; mend the dataset, or set {key} to 'skip' to leave them out"
        )


def _refuse_empty_splits(params: DatasetParams, counts: Counts) -> None:
    empty = [split for split in SPLITS if not counts.images[split]]
    if empty:
        raise UserError(
            f"{params.root}: no image in {' and '.join(empty)} (images: {counts.images}, left out: "
            f"{counts.left_out}, skipped: {counts.skipped}); give every split images, by split in "
            "dataset.captions or by dataset.splits"
        )
