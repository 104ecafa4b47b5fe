"""The images and captions that all systems use, and their folds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import file_digest
from pipeline.captions.records import Record, Split
from pipeline.captions.sources.dataset import DatasetParams, prepare
from pipeline.captions.text import TextCaption
from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer
from pipeline.captions.tokens import TokenizedDataset, tokenize
from pipeline.errors import UserError
from pipeline.metrics.corpus import Words
from pipeline.params import check

NUM_FOLDS = 5
MAX_VAL_IMAGES = 20


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Image ids of one fold: `test`, and all others split into `train` and `val`."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    """Validation images of gridcap; the other systems train on them."""
    test: tuple[int, ...]

    @property
    def train_and_val(self) -> tuple[int, ...]:
        """All images outside the fold."""
        return tuple(sorted(self.train + self.val))


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """The images and captions that all systems use."""

    folder: Path
    """Folder of the image files."""
    records: Mapping[int, Record]
    digests: Mapping[int, str]
    """SHA-256 of each image file."""
    references: Mapping[int, Sequence[Words]]
    """Captions of each image as words."""

    def tokenize_splits(
        self,
        params: TokenizeParams,
        splits: Mapping[Split, Sequence[int]],
        source: Path,
        text: Sequence[TextCaption] = (),
    ) -> TokenizedDataset:
        """Tokenize a text and the captions of images by split; errors name `source`."""
        records = [
            replace(self.records[image_id], split=split)
            for split, image_ids in splits.items()
            for image_id in image_ids
        ]
        return tokenize(records, params, source, text)

    def describe(self, fold: Fold) -> Any:
        """Return the records and image digests of a fold as JSON values."""
        return [
            [(asdict(self.records[image_id]), self.digests[image_id]) for image_id in part]
            for part in asdict(fold).values()
        ]


def assign_folds(image_ids: Sequence[int], num_folds: int = NUM_FOLDS) -> list[Fold]:
    """Assign images to folds of nearly equal size by a seeded shuffle that does not depend on their order.

    Up to `MAX_VAL_IMAGES` of the images outside a fold, and at most a fifth of them, are its `val`.

    Raises:
        UserError: There are fewer images than folds.
    """
    if len(image_ids) < num_folds:
        raise UserError(f"--images {len(image_ids)}: must be at least the number of folds, {num_folds}.")
    order = np.random.default_rng(0).permutation(sorted(image_ids)).tolist()
    folds = []
    for fold in range(num_folds):
        train_and_val = [image_id for index, image_id in enumerate(order) if index % num_folds != fold]
        num_val = min(MAX_VAL_IMAGES, len(train_and_val) // 5)
        folds.append(
            Fold(
                train=tuple(train_and_val[num_val:]),
                val=tuple(train_and_val[:num_val]),
                test=tuple(order[fold::num_folds]),
            )
        )
    return folds


def read_images(real: Path, num_images: int | None, params: TokenizeParams) -> ImageSet:
    """Read the images and captions.

    Args:
        real: Folder of images and encoder weights.
        num_images: Size of a random sample of the images; None for all images.
        params: Tokenization of the references.
    """
    dataset = {
        "format": "flickr8k",
        "root": str(real / "flickr"),
        "images": "images",
        "captions": [{"file": "captions.txt", "folder": ".", "split": None}],
        "splits": {"by": "json", "file": "splits.json"},
        "missing_images": "error",
        "bad_images": "error",
        "bad_captions": "error",
    }
    folder = real / "flickr" / "images"
    all_records, *_ = prepare(check(dataset, "dataset", DatasetParams, str(real)))
    all_records.sort(key=lambda record: record.image_id)
    order = np.random.default_rng(0).permutation(len(all_records))
    return make_image_set([all_records[index] for index in order[:num_images]], folder, params)


def make_image_set(records: Sequence[Record], folder: Path, params: TokenizeParams) -> ImageSet:
    """Digest the image files of records, and tokenize their references.

    Args:
        records: The records.
        folder: Folder of the image files.
        params: Tokenization of the references.
    """
    tokenizer = make_tokenizer(params)
    return ImageSet(
        folder=folder,
        records={record.image_id: record for record in records},
        digests={record.image_id: file_digest(folder / record.file) for record in records},
        references={
            record.image_id: [words for words in map(tokenizer, record.captions) if words] for record in records
        },
    )
