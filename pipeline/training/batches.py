"""Batches of images with all of their captions; seed and epoch alone determine their order.

Shapes: `B` images, `K` captions per image, `T` words, `P` regions, `C` channels.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.captions.tokens import CaptionTokens
from pipeline.captions.vocabulary import PAD
from pipeline.device import copy_ahead, pin
from pipeline.features.store import Grids

BATCHES_PER_BUCKET = 16
"""Batches whose images are sorted by caption length together. A higher value means less padding and less shuffling."""

_PREFETCHED_BATCHES = 2

_CPU = torch.device("cpu")

_ImageViews = NDArray[np.int64]
"""Index of each image in the split, and index of one of its stored views [B, 2]."""


class GridSource(Protocol):
    """Where batches read grids, such as a `FeatureStore`."""

    @property
    def views(self) -> Sequence[object]:
        """Views of every image."""

    def grids(self, image_ids: Iterable[int], views: Iterable[int]) -> Grids:
        """Return the grids [B, P, C] of some images, each of the view with an index."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some images with all of their captions."""

    image_ids: tuple[int, ...]
    grids: Tensor
    """Grids [B, P, C], float16."""
    tokens: Tensor
    """Token ids [B, K, T], padded with `<pad>` to the longest caption and to the most captions of an image."""
    has_captions: bool = True
    """False for the image without captions that a process gets if there are more processes than images."""


class CaptionBatches:
    """The images of a split in batches, with their grids."""

    def __init__(
        self,
        captions: CaptionTokens,
        store: GridSource,
        batch_size: int,
        random_views: bool = False,
        device: torch.device = _CPU,
        steps_multiple: int = 1,
    ) -> None:
        """Group the captions of a split by image.

        Args:
            captions: Captions of the split.
            store: Grids of its images.
            batch_size: Images per batch.
            random_views: Sample one of an image's stored views in each shuffled epoch instead of using the first.
            device: Device of the batches. A GPU gets each batch while it computes on the one before.
            steps_multiple: Pad the tokens of each batch so that the number of decoding steps is a multiple.
        """
        self._captions = captions
        self._store = store
        self._batch_size = batch_size
        self._device = device
        self._steps_multiple = steps_multiple
        self._num_views = len(store.views) if random_views else 1
        self._first_caption = captions.first_of_image
        self._num_captions = np.diff(self._first_caption, append=len(captions.image_id))
        self.image_ids = tuple(captions.image_id[self._first_caption].tolist())

    def __len__(self) -> int:
        """Return the number of batches per epoch. The last batch of `by_length` may be smaller."""
        return -(-len(self.image_ids) // self._batch_size)

    def by_length(self) -> Iterator[Batch]:
        """Yield every image once, sorted by its longest caption, which keeps padding short."""
        order = np.argsort(self._max_length(), kind="stable")
        return self._load(self._split(order, np.zeros_like(order)))

    def shuffled(
        self, seed: int, epoch: int, start_batch: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Yield every image once, in the random order of one epoch.

        Images with captions of similar length share a batch, which keeps padding short: images are shuffled, sorted by
        length within buckets of several batches, and the batches are shuffled again.

        Args:
            seed: Seed of the run.
            epoch: Index of the epoch, from 0.
            start_batch: Batches to skip when a run resumes within the epoch.
            rank: Rank of this process, which gets its share of the images of every batch.
            world_size: Number of processes. If there are more processes than images in a batch, the remaining processes
                get one image without captions.
        """
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self.image_ids))
        bucket_size = BATCHES_PER_BUCKET * self._batch_size
        max_length = self._max_length()
        for start in range(0, len(order), bucket_size):
            bucket = order[start : start + bucket_size]
            order[start : start + bucket_size] = bucket[np.argsort(max_length[bucket], kind="stable")]
        batches = self._split(order, rng.integers(self._num_views, size=len(order)))
        batches = [batches[index] for index in rng.permutation(len(batches))][start_batch:]
        shares = [batch[rank::world_size] for batch in batches]
        loaded = self._load([share if len(share) else batch[:1] for share, batch in zip(shares, batches, strict=True)])
        for share, batch in zip(shares, loaded, strict=True):
            yield batch if len(share) else replace(batch, tokens=torch.full_like(batch.tokens, PAD), has_captions=False)

    def _max_length(self) -> NDArray[np.int64]:
        """Return the length of the longest caption of each image, in ids."""
        max_length: NDArray[np.int64] = np.maximum.reduceat(self._captions.length, self._first_caption)
        return max_length

    def _split(self, images: NDArray[np.int64], views: NDArray[np.int64]) -> list[_ImageViews]:
        """Divide images and their views into batches. Arrays need a fifth of the memory of lists."""
        image_views = np.stack([images, views], axis=1)  # [N, 2]
        return [image_views[start : start + self._batch_size] for start in range(0, len(images), self._batch_size)]

    def _load(self, batches: Sequence[_ImageViews]) -> Iterator[Batch]:
        """Load batches in a background thread, some batches ahead of the caller, and copy them to the device."""
        loaded = self._read_ahead(batches)
        if self._device.type == "cpu":
            return loaded
        pinned = ((batch, (batch.grids, batch.tokens)) for batch in loaded)
        return (
            replace(batch, grids=grids, tokens=tokens) for batch, (grids, tokens) in copy_ahead(pinned, self._device)
        )

    def _read_ahead(self, batches: Sequence[_ImageViews]) -> Iterator[Batch]:
        with ThreadPoolExecutor(max_workers=1) as reader:
            pending = [reader.submit(self._load_batch, views) for views in batches[:_PREFETCHED_BATCHES]]
            for index in range(len(batches)):
                batch = pending.pop(0).result()
                if index + _PREFETCHED_BATCHES < len(batches):
                    pending.append(reader.submit(self._load_batch, batches[index + _PREFETCHED_BATCHES]))
                yield batch

    def _load_batch(self, image_views: _ImageViews) -> Batch:
        images, views = image_views.T  # [B] each
        image_ids = tuple(self.image_ids[image] for image in images.tolist())
        index = images[:, np.newaxis]  # [B, 1]
        caption = np.arange(self._num_captions[index].max())  # [K]
        is_caption = caption < self._num_captions[index]  # [B, K]
        rows = self._first_caption[index] + np.where(is_caption, caption, 0)  # [B, K]
        tokens = np.where(is_caption[..., np.newaxis], self._captions.padded(rows), PAD)  # [B, K, T]
        padding = (1 - tokens.shape[2]) % self._steps_multiple
        if padding:
            tokens = np.pad(tokens, ((0, 0), (0, 0), (0, padding)), constant_values=PAD)
        return Batch(
            image_ids=image_ids,
            grids=pin(torch.from_numpy(self._store.grids(image_ids, views.tolist())), self._device),
            tokens=pin(torch.from_numpy(tokens.astype(np.int64)), self._device),
        )
