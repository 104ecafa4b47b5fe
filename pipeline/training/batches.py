"""Batches for training and validation: images with all their captions, in an order that (seed, epoch) alone fixes.

Shapes: `B` images, `K` captions an image, `T` words, `P` regions, `C` channels.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.captions.tokens import CaptionTokens
from pipeline.captions.vocabulary import PAD
from pipeline.features.store import FeatureStore

BATCHES_A_STRETCH = 16
"""Batches over which images are sorted by length: the more, the less padding and the less chance in an order."""


_Shown = tuple[int, int]
"""An image's id and the place of the view to show of it."""


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

    def __init__(
        self, captions: CaptionTokens, store: FeatureStore, batch_size: int, random_views: bool = False
    ) -> None:
        """With `random_views`, a shuffled epoch shows a random one of the views of each image, not the first."""
        self._tokens = captions.tokens
        self._length = captions.length
        self._store = store
        self._size = batch_size
        self._views = len(store.views) if random_views else 1
        self._rows: dict[int, list[int]] = {}
        for row, image_id in enumerate(captions.image_id.tolist()):
            self._rows.setdefault(image_id, []).append(row)
        self.image_ids = tuple(self._rows)

    def __len__(self) -> int:
        """Batches an epoch; the last may be smaller."""
        return -(-len(self._rows) // self._size)

    def in_order(self) -> Iterator[Batch]:
        """Every image once, in the order of the split."""
        return self._serve(self._parts([(image_id, 0) for image_id in self.image_ids]))

    def shuffled(self, seed: int, epoch: int, first: int = 0, share: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Every image once in the order of one epoch, from batch number `first` on.

        Of several ranks, `share` says which one is served (rank, size): each has its part of every batch, or, where a
        batch has fewer images than there are ranks, an image without captions.

        Images with captions of like length share a batch, so that little of it is padding: they are shuffled, sorted
        by length in stretches of some batches, and the batches shuffled again.
        """
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self.image_ids))
        stretch = BATCHES_A_STRETCH * self._size
        longest = np.array([self._length[rows].max() for rows in self._rows.values()])
        for start in range(0, len(order), stretch):
            near = order[start : start + stretch]
            order[start : start + stretch] = near[np.argsort(longest[near], kind="stable")]
        views = rng.integers(self._views, size=len(order)).tolist()
        parts = self._parts([(self.image_ids[place], views[place]) for place in order])
        parts = [parts[place] for place in rng.permutation(len(parts))][first:]
        rank, size = share
        shares = [part[rank::size] for part in parts]
        served = self._serve([own or part[:1] for own, part in zip(shares, parts, strict=True)])
        for own, batch in zip(shares, served, strict=True):
            yield batch if own else replace(batch, tokens=torch.full_like(batch.tokens, PAD))

    def _parts(self, shown: Sequence[_Shown]) -> list[Sequence[_Shown]]:
        return [shown[start : start + self._size] for start in range(0, len(shown), self._size)]

    def _serve(self, parts: Sequence[Sequence[_Shown]]) -> Iterator[Batch]:
        with ThreadPoolExecutor(max_workers=1) as reader:
            coming = [reader.submit(self._batch, part) for part in parts[:2]]
            for part in [*parts[2:], None, None][: len(parts)]:
                batch = coming.pop(0).result()
                if part is not None:
                    coming.append(reader.submit(self._batch, part))
                yield batch

    def _batch(self, shown: Sequence[_Shown]) -> Batch:
        image_ids, views = zip(*shown, strict=True)
        rows = [self._rows[image_id] for image_id in image_ids]
        width = int(max(self._length[own].max() for own in rows))
        tokens: NDArray[np.int64] = np.full((len(rows), max(map(len, rows)), width), PAD, dtype=np.int64)
        for place, own in enumerate(rows):
            tokens[place, : len(own)] = self._tokens[own, :width]
        return Batch(
            image_ids=image_ids,
            grids=torch.from_numpy(self._store.grids(image_ids, views)),
            tokens=torch.from_numpy(tokens),
        )
