"""Near-duplicates: images of val or test whose grids nearly equal that of an image of another split.

The similarity of two images is the cosine between their grids, after the mean grid of the dataset and then the mean of
each channel over the regions are subtracted. Comparing the grids of all pairs would take too long, so candidates are
found by sketches, which are random signed sums of the regions.

Shapes: N images, T images of val and test, P regions of a grid, C channels, S sums of a sketch, K candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from typing_extensions import TypedDict

from pipeline.artifacts import Int64, Schema, file_digest, fingerprint, read_document, write_document
from pipeline.captions.records import SPLITS, Split
from pipeline.features.store import INDEX_FILE, FeatureStore
from pipeline.import_graph import code_digest

SCHEMA = Schema("gridcap.near_duplicates", 1)
NEAR_DUPLICATES_FILE = "near_duplicates.json"

MIN_SIMILARITY = 0.8
"""Similarity of near-duplicates; section Leaks of docs/datasets.md has measurements."""
_MIN_SKETCH_SIMILARITY = 0.6
_NUM_CANDIDATES = 4
_MIN_SKETCH_SIZE = 1024
_MAX_MEAN_IMAGES = 1000
_BLOCK_SIZE = 64
"""Images whose grids are read at once."""
_REMEDY = "Run `dvc repro -f -s encode`."


@dataclass(frozen=True, kw_only=True)
class NearDuplicate:
    """An image of val or test with a near-duplicate in another split."""

    image_id: Int64
    other_id: Int64
    """The most similar image of the other splits."""
    similarity: Annotated[float, Field(ge=MIN_SIMILARITY, le=1)]
    """Similarity of the two, rounded to 3 digits."""


class _Document(TypedDict):
    near_duplicates: tuple[NearDuplicate, ...]


def find_near_duplicates(store: FeatureStore, splits: Mapping[int, Split], desc: str) -> tuple[NearDuplicate, ...]:
    """Compare the images of val and test with those of the other splits.

    Images whose files have the same bytes are not near-duplicates but leaks that `prepare` counts.

    Args:
        store: The feature store; the first view of each image is compared.
        splits: Split of each image of the store.
        desc: Label of the progress bar, which is shown on a terminal only.

    Returns:
        Near-duplicates by image id.
    """
    by_split = {split: [image_id for image_id in store.image_ids if splits[image_id] == split] for split in SPLITS}
    targets = [*by_split["val"], *by_split["test"]]
    num_val = len(by_split["val"])
    # Targets to compare with the images of each split: those of the other splits.
    rows = {"train": slice(None), "val": slice(num_val, None), "test": slice(num_val)}
    if not targets or sum(map(bool, by_split.values())) < 2:
        return ()
    comparison = _Comparison(store)
    sketches = torch.empty(len(targets), comparison.sketch_size)
    similarity = torch.full((len(targets), _NUM_CANDIDATES), -1.0)  # [T, K]
    other_ids = torch.zeros(len(targets), _NUM_CANDIDATES, dtype=torch.int64)  # [T, K]
    with tqdm(desc=desc, total=len(targets) + len(store.image_ids), unit="image", disable=None) as progress:
        for start in range(0, len(targets), _BLOCK_SIZE):
            block = targets[start : start + _BLOCK_SIZE]
            sketches[start : start + len(block)] = comparison.sketch(block)
            progress.update(len(block))
        for split, image_ids in by_split.items():
            for start in range(0, len(image_ids), _BLOCK_SIZE):
                block = image_ids[start : start + _BLOCK_SIZE]
                block_similarity = sketches[rows[split]] @ comparison.sketch(block).T  # [<= T, N]
                # Few targets have a candidate in a block. To select the best for all would take a quarter of the time.
                hits = (block_similarity.amax(dim=1) >= _MIN_SKETCH_SIMILARITY).nonzero()[:, 0]  # [H]
                block_similarity = block_similarity[hits]  # [H, N]
                values = torch.cat([similarity[rows[split]][hits], block_similarity], dim=1)
                ids = torch.cat([other_ids[rows[split]][hits], torch.tensor(block).expand_as(block_similarity)], dim=1)
                values, index = values.topk(_NUM_CANDIDATES, dim=1)
                similarity[rows[split]][hits] = values
                other_ids[rows[split]][hits] = ids.gather(1, index)
                progress.update(len(block))
    is_candidate = similarity >= _MIN_SKETCH_SIMILARITY  # [T, K]
    candidates = {
        targets[row]: other_ids[row, is_candidate[row]].tolist() for row in is_candidate.any(1).nonzero()[:, 0]
    }
    matches = (comparison.best_match(image_id, others) for image_id, others in sorted(candidates.items()))
    return tuple(match for match in matches if match is not None)


def center_grids(grids: Tensor, mean: Tensor) -> Tensor:
    """Convert grids to vectors of unit length, whose products are similarities.

    Args:
        grids: float32 [N, P, C].
        mean: Mean grid of the dataset, [P, C].

    Returns:
        float32 [N, P * C].
    """
    grids = grids - mean
    return functional.normalize((grids - grids.mean(dim=1, keepdim=True)).flatten(1), dim=1)


class _Comparison:
    """Sketches and similarities of the images of a store."""

    def __init__(self, store: FeatureStore) -> None:
        """Compute the mean grid of at most `_MAX_MEAN_IMAGES` images, evenly spaced."""
        self.store = store
        step = -(-len(store.image_ids) // _MAX_MEAN_IMAGES)
        total = np.zeros(store.grid_shape)
        for image_id in store.image_ids[::step]:
            total += store.grid(image_id)
        self.mean = torch.from_numpy(total / len(store.image_ids[::step])).float()  # [P, C]
        num_regions, channels = store.grid_shape
        num_sums = -(-_MIN_SKETCH_SIZE // channels)
        self.sketch_size = num_sums * channels
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (num_sums, num_regions), generator=generator) * 2.0 - 1.0  # [S, P]
        self.signs = signs - signs.mean(dim=1, keepdim=True)  # subtracts the mean over the regions

    def sketch(self, image_ids: Sequence[int]) -> Tensor:
        """Return sketches of unit length, whose products approximate similarities: [N, S * C]."""
        grids = torch.from_numpy(self.store.grids(image_ids)).float()  # [N, P, C]
        return functional.normalize((self.signs @ (grids - self.mean)).flatten(1), dim=1)

    def best_match(self, image_id: int, other_ids: Sequence[int]) -> NearDuplicate | None:
        """Return the most similar of other images, or None if it is not a near-duplicate."""
        row = self.store.first_row(image_id)
        other_ids = [other_id for other_id in other_ids if self.store.first_row(other_id) != row]
        if not other_ids:
            return None
        unit = center_grids(torch.from_numpy(self.store.grids([image_id, *other_ids])).float(), self.mean)
        similarity, index = (unit[1:] @ unit[0]).max(dim=0)
        rounded = round(min(1.0, float(similarity)), 3)
        if rounded < MIN_SIMILARITY:
            return None
        return NearDuplicate(image_id=image_id, other_id=other_ids[int(index)], similarity=rounded)


def search_fingerprint(store: Path, splits: Mapping[int, Split]) -> str:
    """Compute the fingerprint of everything that determines the near-duplicates of a store.

    Args:
        store: Folder of the store.
        splits: Split of each image of the store.
    """
    return fingerprint(
        index=file_digest(store / INDEX_FILE),
        splits=sorted(splits.items()),
        code=code_digest(__name__),
        torch=torch.__version__,
    )


def write_near_duplicates(folder: Path, near_duplicates: Sequence[NearDuplicate]) -> None:
    """Write `near_duplicates.json` into the folder of a store."""
    content = {"near_duplicates": [asdict(near_duplicate) for near_duplicate in near_duplicates]}
    write_document(folder / NEAR_DUPLICATES_FILE, SCHEMA, content)


def read_near_duplicates(folder: Path) -> tuple[NearDuplicate, ...]:
    """Read `near_duplicates.json` from the folder of a store.

    Raises:
        UserError: The file is missing, damaged, or of another schema version.
    """
    return read_document(folder / NEAR_DUPLICATES_FILE, _Document, _REMEDY, SCHEMA)["near_duplicates"]
