"""Rows a second from the feature store: beside bare reads of the same bytes, and beside HDF5's compressions.

The store of 2,048 rows, which lie in the page cache, is read in random batches through `FeatureStore.grids`.
preadv: the same rows, in the same order, from open files at known places, with `os.preadv` into a new array a batch.
h5py: the same rows, one by one, from one dataset with a chunk a row: uncompressed, and with the compressions that every
HDF5 has. A rectified ResNet's grids are about half zeros, the rest like the positive half of a normal distribution; so
are these.

Rounds take all of them in turn. Rates are medians of the rounds, and so are their ratios, each taken within its round.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np

from pipeline.features.encoding import ROWS_PER_SHARD
from pipeline.features.store import EncoderSpec, FeatureStore, Grids, Shard, write_index, write_shard

SETTING = EncoderSpec(
    architecture="resnet50",
    layer="layer4",
    weights_digest="0" * 64,
    image_size=224,
    precision="float32",
    compiled=False,
    grid_height=7,
    grid_width=7,
    channels=2048,
)
SHARDS, ROWS_A_BATCH, BATCHES, ROUNDS = 16, 64, 16, 21
COMPRESSED_BATCHES = 2
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "h5py, uncompressed": {},
    "h5py, lzf and shuffle": {"compression": "lzf", "shuffle": True},
    "h5py, gzip 4 and shuffle": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
}

Read = Callable[[Sequence[int]], Grids]
"""Read the grids of a batch of images: float16 [B, P, C]."""


def write_store(folder: Path) -> list[Shard]:
    """A store in which image `i` has row `i % ROWS_A_SHARD` of shard `i // ROWS_A_SHARD`."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((ROWS_PER_SHARD, *SETTING.grid_shape), dtype=np.float32)
    block = np.maximum(normal, 0).astype(np.float16)
    shards: list[Shard] = []
    contents: dict[int, str] = {}
    for number in range(SHARDS):
        image_ids = range(number * ROWS_PER_SHARD, (number + 1) * ROWS_PER_SHARD)
        own = {image_id: f"{image_id:064}" for image_id in image_ids}
        keys = [(content, "whole") for content in own.values()]
        # Random numbers for all would take longer than all the rest; moved along, they make other rows.
        shards.append(write_shard(folder, SETTING, image_ids, keys, np.roll(block, number, axis=-1)))
        contents |= own
    write_index(folder, SETTING, ["whole"], shards, contents)
    return shards


@contextmanager
def uncaptioned_images(shards: Sequence[Shard]) -> Iterator[Read]:
    places = []
    for shard in shards:
        with h5py.File(shard.path, "r") as file:
            places.append((os.open(shard.path, os.O_RDONLY), file["grid"].id.get_offset()))

    def read(image_ids: Sequence[int]) -> Grids:
        grids = np.empty((len(image_ids), *SETTING.grid_shape), dtype=np.float16)
        for grid, image_id in zip(grids, image_ids, strict=True):
            descriptor, offset = places[image_id // ROWS_PER_SHARD]
            os.preadv(descriptor, [grid.data], offset + image_id % ROWS_PER_SHARD * grid.nbytes)
        return grids

    yield read
    for descriptor, _ in places:
        os.close(descriptor)


@contextmanager
def compressed(path: Path, store: FeatureStore, options: dict[str, Any]) -> Iterator[tuple[Read, float]]:
    """Also gives how many bytes a byte of the file stands for."""
    images, shape = len(store.image_ids), SETTING.grid_shape
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("grid", (images, *shape), "<f2", chunks=(1, *shape), **options)
        for start in range(0, images, ROWS_PER_SHARD):
            rows = store.image_ids[start : start + ROWS_PER_SHARD]
            dataset[start : start + len(rows)] = store.grids(rows)

    with h5py.File(path, "r") as file:
        dataset = file["grid"]

        def read(image_ids: Sequence[int]) -> Grids:
            grids = np.empty((len(image_ids), *shape), dtype=np.float16)
            for place, image_id in enumerate(image_ids):
                dataset.read_direct(grids, np.s_[image_id], np.s_[place])
            return grids

        yield read, dataset.nbytes / dataset.id.get_storage_size()


def main() -> None:
    """Print rows and gigabytes a second of all, and their shares of the bare reads' rate."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        shards = write_store(Path(folder))
        store = FeatureStore(Path(folder))
        ratios = {"FeatureStore": 1.0, "preadv": 1.0}
        reads: dict[str, Read] = {
            "FeatureStore": store.grids,
            "preadv": stack.enter_context(uncaptioned_images(shards)),
        }
        for number, (name, options) in enumerate(COMPRESSIONS.items()):
            path = Path(folder) / f"{number}.h5"
            reads[name], ratios[name] = stack.enter_context(compressed(path, store, options))

        images = len(store.image_ids)
        batches = np.random.default_rng(0).permutation(images)[: BATCHES * ROWS_A_BATCH].reshape(BATCHES, -1).tolist()
        for name, read in reads.items():
            assert np.array_equal(read(batches[0]), reads["preadv"](batches[0])), name
        rates: dict[str, list[float]] = {name: [] for name in reads}
        for _ in range(ROUNDS):
            for name, read in reads.items():
                own = batches[:COMPRESSED_BATCHES] if name in COMPRESSIONS else batches
                began = time.perf_counter()
                for batch in own:
                    read(batch)
                rates[name].append(len(own) * ROWS_A_BATCH / (time.perf_counter() - began))

    row = np.prod(SETTING.grid_shape) * np.dtype(np.float16).itemsize
    print(f"reading {images} rows of 7 x 7 x 2048 float16 in batches of {ROWS_A_BATCH}; median of {ROUNDS} rounds")
    print(f"{'':>26} {'rows a second':>14} {'GB a second':>12} {'of preadv':>10} {'bytes a byte':>13}")
    for name, measured in rates.items():
        rate = median(measured)
        share = median(own / its for own, its in zip(measured, rates["preadv"], strict=True))
        print(f"{name:>26} {rate:>14.0f} {rate * row / 1e9:>12.2f} {share:>10.3f} {ratios[name]:>13.2f}")
