"""Assignment of images to train, val and test if the caption files set no split."""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from pipeline.artifacts import read_json
from pipeline.captions.records import SPLITS, Split
from pipeline.captions.sources.parsed_file import REMEDY, ParsedImage, read_text, require_relative
from pipeline.errors import UserError, summarize
from pipeline.params import DISCRIMINATOR, params_section


@params_section
class ListedSplits:
    """Splits from text files, such as Flickr8k's official lists, with one image path or id per line."""

    by: Literal["lists"]
    """Method: `lists`."""
    train: str
    """Text file below dataset.root with the train images, as paths relative to the image folder."""
    val: str
    """Text file below dataset.root with the validation images."""
    test: str
    """Text file below dataset.root with the test images."""

    def __post_init__(self) -> None:
        require_relative(*self.files)

    @property
    def files(self) -> tuple[str, ...]:
        """The split files."""
        return self.train, self.val, self.test


@params_section
class JsonSplits:
    """Splits from one JSON file."""

    by: Literal["json"]
    """Method: `json`."""
    file: str
    """JSON file below dataset.root: `{"train": [...], "val": [...], "test": [...]}`, with paths relative to the image
    folder."""

    def __post_init__(self) -> None:
        require_relative(self.file)

    @property
    def files(self) -> tuple[str, ...]:
        """The split file."""
        return (self.file,)


@params_section
class SeededSplits:
    """Random splits, by a hash of the seed and the image id."""

    by: Literal["seed"]
    """Method: `seed`."""
    seed: int
    """Seed of the random splits."""
    val: Annotated[float, Field(ge=0, le=1)]
    """Fraction of the images in val; the count is rounded."""
    test: Annotated[float, Field(ge=0, le=1)]
    """Fraction of the images in test; the remaining images are in train."""

    def __post_init__(self) -> None:
        if self.val + self.test > 1:
            raise ValueError(f"val + test must be <= 1, got {self.val} + {self.test}")

    @property
    def files(self) -> tuple[str, ...]:
        """No split files."""
        return ()


Splits = Annotated[ListedSplits | JsonSplits | SeededSplits, Field(discriminator=DISCRIMINATOR)]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitAssignment:
    """The split of every image."""

    split_by_file: dict[str, Split]
    """Split by image path; images that are in no split are absent."""
    unknown_images: list[str]
    """Images that are in a split file but in no caption file, each with its location."""


class _ListedImage(NamedTuple):
    file: str
    split: Split
    location: str


def assign_splits(images: Sequence[ParsedImage], params: Splits | None, root: Path) -> SplitAssignment:
    """Assign each image to the split that its caption file sets, and the remaining images by `params`.

    With split files, an image that they do not list is in no split.

    Args:
        images: All images of the dataset.
        params: Method for images whose caption file sets no split; None if there are no such images.
        root: Dataset folder, which contains the split files.

    Raises:
        UserError: An image has no split and `params` is None, or an image is in two splits, or a split file is missing
            or malformed.
    """
    split_by_file = {image.file: image.split for image in images if image.split}
    without_split = [image for image in images if not image.split]
    match params:
        case None:
            if without_split:
                raise UserError(
                    f"{without_split[0].location}: image without a split ({len(without_split)} in total)."
                    " Set split in dataset.captions, or set dataset.splits."
                )
            return SplitAssignment(split_by_file=split_by_file, unknown_images=[])
        case SeededSplits():
            split_by_file |= _random_splits(without_split, params)
            return SplitAssignment(split_by_file=split_by_file, unknown_images=[])
        case ListedSplits() | JsonSplits():
            listed = _match_listed(images, _read_split_files(params, root))
            from_captions = (_ListedImage(file, split, "its caption file") for file, split in split_by_file.items())
            _check_one_split_each([*from_captions, *listed])
            split_by_file |= {image.file: image.split for image in listed}
            captioned_files = {image.file for image in images}
            return SplitAssignment(
                split_by_file={file: split for file, split in split_by_file.items() if file in captioned_files},
                unknown_images=[
                    f"{image.file} ({image.location})" for image in listed if image.file not in captioned_files
                ],
            )


def _match_listed(images: Sequence[ParsedImage], listed: Iterable[_ListedImage]) -> list[_ListedImage]:
    """Replace each entry of the split files by the path of its image.

    An entry is a path, in any Unicode normalization, or a path or name without its suffix, as in the lists of
    Flickr30k Entities. Entries that match no image are unchanged.

    Raises:
        UserError: An entry matches several images.
    """
    files = {image.file for image in images}
    matches: dict[str, set[str]] = {}
    for file in sorted(files):
        path = PurePosixPath(_normalize(file))
        for key in (str(path), str(path.with_suffix("")), path.stem):
            matches.setdefault(key, set()).add(file)
    matched, ambiguous = [], []
    for image in listed:
        candidates = {image.file} if image.file in files else matches.get(_normalize(image.file), {image.file})
        if len(candidates) > 1:
            ambiguous.append(f"{image.location}: {image.file} matches {summarize(sorted(candidates))}")
        matched.append(image._replace(file=min(candidates)))
    if ambiguous:
        raise UserError(f"{summarize(ambiguous)}. Write the paths of the images, relative to the image folder.")
    return matched


def _normalize(file: str) -> str:
    return unicodedata.normalize("NFC", file)


def _random_splits(images: Sequence[ParsedImage], params: SeededSplits) -> dict[str, Split]:
    """Split images at random, with exact counts, independent of their order.

    The images are sorted by a hash of seed and id, and the list is cut. Adding or removing an image changes the split
    of at most two other images.
    """

    def sort_key(image: ParsedImage) -> tuple[bytes, int]:
        return hashlib.sha256(f"{params.seed} {image.image_id}".encode()).digest(), image.image_id

    files = [image.file for image in sorted(images, key=sort_key)]
    val_end = round(params.val * len(files))
    test_end = min(val_end + round(params.test * len(files)), len(files))
    split_by_file: dict[str, Split] = dict.fromkeys(files, "train")
    split_by_file.update(dict.fromkeys(files[:val_end], "val"))
    split_by_file.update(dict.fromkeys(files[val_end:test_end], "test"))
    return split_by_file


def _read_split_files(params: ListedSplits | JsonSplits, root: Path) -> list[_ListedImage]:
    if isinstance(params, JsonSplits):
        path = root / params.file
        return [
            _ListedImage(str(file), split, f"{path}: {split}[{index}]")
            for split, files in read_json(path, dict[Split, list[str | int]], REMEDY).items()
            for index, file in enumerate(files)
        ]
    paths = [root / name for name in params.files]
    return [
        _ListedImage(file, split, f"{path}:{line_number}")
        for split, path in zip(SPLITS, paths, strict=True)
        for line_number, line in enumerate(read_text(path).splitlines(), start=1)
        if (file := line.strip())
    ]


def _check_one_split_each(images: Iterable[_ListedImage]) -> None:
    first_seen: dict[str, _ListedImage] = {}
    conflicts = []
    for image in images:
        first = first_seen.setdefault(image.file, image)
        if first.split != image.split:
            conflicts.append(
                f"{image.location}: {image.file} is in {image.split}, but also in {first.split} ({first.location})"
            )
    if conflicts:
        raise UserError(f"{summarize(conflicts)}. Keep each image in one split.")
