"""Batches for training and validation: images with all their captions, in an order that (seed, epoch) alone fixes.

Shapes: `B` images, `K` captions an image, `T` words, `P` regions, `C` channels.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.captions.tokens import CaptionTokens
from pipeline.captions.vocabulary import PAD
from pipeline.features.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some images and all their captions."""

    image_ids: tuple[int, ...]
    grids: Tensor
    """[B, P, C] float16"""
    tokens: Tensor
    """[B, K, T] ids, cut to the longest caption; where an image has fewer than K captions, rows of `<pad>`."""


class CaptionBatches:
    """The captions of a split, served with their images' grids, a few images at a time."""

    def __init__(self, captions: CaptionTokens, store: FeatureStore, images_a_batch: int) -> None:
        self._tokens = captions.tokens
        self._length = captions.length
        self._store = store
        self._size = images_a_batch
        self._rows: dict[int, list[int]] = {}
        for row, image_id in enumerate(captions.image_id.tolist()):
            self._rows.setdefault(image_id, []).append(row)
        self.image_ids = tuple(self._rows)

    def __len__(self) -> int:
        """Batches an epoch; the last may be smaller."""
        return -(-len(self._rows) // self._size)

    def in_order(self) -> Iterator[Batch]:
        """Every image once, in the order of the split."""
        return self._serve(self.image_ids)

    def shuffled(self, seed: int, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Every image once in the order of one epoch, from batch number `first` on."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.image_ids))
        return self._serve([self.image_ids[place] for place in order][first * self._size :])

    def _serve(self, image_ids: Sequence[int]) -> Iterator[Batch]:
        parts = [image_ids[start : start + self._size] for start in range(0, len(image_ids), self._size)]
        with ThreadPoolExecutor(max_workers=1) as reader:
            coming = [reader.submit(self._batch, part) for part in parts[:2]]
            for part in [*parts[2:], None, None][: len(parts)]:
                batch = coming.pop(0).result()
                if part is not None:
                    coming.append(reader.submit(self._batch, part))
                yield batch

    def _batch(self, image_ids: Sequence[int]) -> Batch:
        rows = [self._rows[image_id] for image_id in image_ids]
        width = int(max(self._length[own].max() for own in rows))
        tokens: NDArray[np.int64] = np.full((len(rows), max(map(len, rows)), width), PAD, dtype=np.int64)
        for place, own in enumerate(rows):
            tokens[place, : len(own)] = self._tokens[own, :width]
        return Batch(
            image_ids=tuple(image_ids),
            grids=torch.from_numpy(self._store.grids(image_ids)),
            tokens=torch.from_numpy(tokens),
        )
