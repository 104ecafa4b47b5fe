"""The division of images into train, val and test, where the caption files do not give it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.captions.records import SPLITS, Split
from pipeline.captions.sources.parsed_file import Entry, read_json, read_text, require_relative, some
from pipeline.errors import UserError
from pipeline.params import params_section


@params_section
class ListedSplits:
    """Three text files, such as Flickr8k's official lists, with one image file a line."""

    by: Literal["lists"]
    """`lists`."""
    train: str
    """Text file below dataset.root: the images to train on, as paths below the image folder."""
    val: str
    """Text file below dataset.root: the images that decide when training stops."""
    test: str
    """Text file below dataset.root: the images that scores are reported on."""

    def __post_init__(self) -> None:
        require_relative(self.train, self.val, self.test)


@params_section
class JsonSplits:
    """One JSON file with the image files of each split."""

    by: Literal["json"]
    """`json`."""
    file: str
    """JSON file below dataset.root: `{"train": [...], "val": [...], "test": [...]}`, as paths below
    the image folder."""

    def __post_init__(self) -> None:
        require_relative(self.file)


@params_section
class SeededSplits:
    """A division drawn by hashing seed and image id."""

    by: Literal["seed"]
    """`seed`."""
    seed: int
    """Another seed draws another division."""
    val: Annotated[float, Field(ge=0, le=1)]
    """Fraction of the images, rounded to whole images, that goes to val."""
    test: Annotated[float, Field(ge=0, le=1)]
    """Fraction of the images, rounded to whole images, that goes to test; train has the rest."""

    def __post_init__(self) -> None:
        if self.val + self.test > 1:
            raise ValueError(f"val and test must not be more than 1 together, got {self.val} and {self.test}")


Splits = Annotated[ListedSplits | JsonSplits | SeededSplits, Field(discriminator="by")]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitAssignment:
    """Which image is in which split."""

    split: dict[str, Split]
    """By file; images left out are absent."""
    unknown_images: list[str]
    """Images that the lists name but no caption file does."""


def assign_splits(entries: Sequence[Entry], params: Splits | None, root: Path) -> SplitAssignment:
    """Give every image the split that its caption file says; divide the others as `params` say.

    Lists leave out the images that they do not name. Raises `UserError` where images stay undivided and where
    one is named in two splits.
    """
    split: dict[str, Split] = {entry.file: entry.split for entry in entries if entry.split}
    undivided = [entry for entry in entries if not entry.split]
    match params:
        case None:
            if undivided:
                raise UserError(
                    f"{undivided[0].place}: nothing says this image's split, nor that of "
                    f"{len(undivided) - 1} others; set split in dataset.captions, or dataset.splits"
                )
            return SplitAssignment(split=split, unknown_images=[])
        case SeededSplits():
            return SplitAssignment(split=split | _draw(undivided, params), unknown_images=[])
        case ListedSplits() | JsonSplits():
            listed = _listed(params, root)
            _refuse_conflicts([*((file, one, "its caption file") for file, one in split.items()), *listed])
            split |= {file: one for file, one, _ in listed}
            known = {entry.file for entry in entries}
            unknown_images = [f"{file} ({place})" for file, _, place in listed if file not in known]
            return SplitAssignment(
                split={file: one for file, one in split.items() if file in known}, unknown_images=unknown_images
            )


def _draw(entries: Sequence[Entry], params: SeededSplits) -> dict[str, Split]:
    """Rank the images by a hash of seed and id, so that counts are exact and order plays no part.

    One image more or less moves at most the few whose rank is next to a border.
    """

    def rank(entry: Entry) -> tuple[bytes, int]:
        return hashlib.sha256(f"{params.seed} {entry.image_id}".encode()).digest(), entry.image_id

    ranked = [entry.file for entry in sorted(entries, key=rank)]
    val = round(params.val * len(ranked))
    test = min(val + round(params.test * len(ranked)), len(ranked))
    split: dict[str, Split] = dict.fromkeys(ranked, "train")
    split.update(dict.fromkeys(ranked[:val], "val"))
    split.update(dict.fromkeys(ranked[val:test], "test"))
    return split


_Listed = tuple[str, Split, str]


def _listed(params: ListedSplits | JsonSplits, root: Path) -> list[_Listed]:
    """File, split and place of every image that the lists name."""
    if isinstance(params, JsonSplits):
        path = root / params.file
        lists = read_json(path, dict[Split, list[str]], "JSON object of file names by split")
        return [
            (file, split, f"{path}, {split}[{number}]")
            for split, files in lists.items()
            for number, file in enumerate(files)
        ]
    paths = [root / name for name in (params.train, params.val, params.test)]
    return [
        (file, split, f"{path}, line {number}")
        for split, path in zip(SPLITS, paths, strict=True)
        for number, line in enumerate(read_text(path).splitlines(), start=1)
        if (file := line.strip())
    ]


def _refuse_conflicts(listed: Iterable[_Listed]) -> None:
    first: dict[str, tuple[Split, str]] = {}
    conflicts = []
    for file, split, place in listed:
        other, other_place = first.setdefault(file, (split, place))
        if other != split:
            conflicts.append(f"{file} is in {other} ({other_place}) and in {split} ({place})")
    if conflicts:
        raise UserError(f"images in two splits: {some(conflicts)}; leave each in one")
