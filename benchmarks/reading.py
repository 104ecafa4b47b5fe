"""Throughput of the feature store, compared with raw reads of the same bytes and with HDF5 compression.

A store of 2,048 rows, in the page cache, is read in random batches.

FeatureStore: `FeatureStore.grids`.
preadv: the same rows in the same order by `os.preadv`, from open files at precomputed offsets, into a new array per
    batch.
h5py: the same rows, one by one, from a single dataset with one row per chunk: uncompressed, and with the compression
    filters that every HDF5 build has. About half of the values are zeros and the rest are half-normal, as in the grids
    of a ResNet after its ReLU.

Each round runs all readers in turn. Rates and ratios are medians over the rounds; a ratio is taken within its round.

With `--store`, the readers are those of a store on disk, such as one of `scale --random-grids`, whose pages are dropped
from the page cache before each of them. `sequential` reads as many bytes in order, `direct` the same rows with 32
requests at a time and without the page cache: what the disk does at most for reads of this size.
"""

import mmap
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np

from pipeline.features.encoding import ROWS_PER_SHARD
from pipeline.features.store import EncoderSpec, FeatureStore, Grids, Shard, write_index, write_shard

SPEC = EncoderSpec(
    architecture="resnet50",
    layer="layer4",
    weights_digest="0" * 64,
    image_height=224,
    image_width=224,
    resize="squash",
    precision="float32",
    compiled=False,
    grid_height=7,
    grid_width=7,
    channels=2048,
)
NUM_SHARDS, BATCH_SIZE, NUM_BATCHES, NUM_ROUNDS = 16, 64, 16, 21
NUM_COMPRESSED_BATCHES = 2
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "h5py, uncompressed": {},
    "h5py, lzf and shuffle": {"compression": "lzf", "shuffle": True},
    "h5py, gzip 4 and shuffle": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
}

NUM_COLD_BATCHES, NUM_COLD_ROUNDS = 16, 9
NUM_DIRECT_READERS, PAGE_SIZE = 32, 4096

Reader = Callable[[Sequence[int]], Grids]
"""Reads the grids of a batch of images: float16 [B, P, C]."""


def write_store(folder: Path) -> list[Shard]:
    """Write a store in which image `i` is row `i % ROWS_PER_SHARD` of shard `i // ROWS_PER_SHARD`."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((ROWS_PER_SHARD, *SPEC.grid_shape), dtype=np.float32)
    grids = np.maximum(normal, 0).astype(np.float16)
    shards: list[Shard] = []
    image_digests: dict[int, str] = {}
    for i in range(NUM_SHARDS):
        image_ids = range(i * ROWS_PER_SHARD, (i + 1) * ROWS_PER_SHARD)
        digests = {image_id: f"{image_id:064}" for image_id in image_ids}
        keys = [(digest, "whole") for digest in digests.values()]
        # Sampling new grids for each shard would take longer than the benchmark.
        shards.append(write_shard(folder, SPEC, image_ids, keys, np.roll(grids, i, axis=-1)))
        image_digests |= digests
    write_index(folder, SPEC, ["whole"], shards, image_digests)
    return shards


@contextmanager
def open_with_preadv(paths: Sequence[Path]) -> Iterator[Reader]:
    """Open the shards of a store of `write_store` and yield a reader that uses `os.preadv`."""
    files = []
    for path in paths:
        with h5py.File(path, "r") as file:
            files.append((os.open(path, os.O_RDONLY), file["grid"].id.get_offset()))

    def read(image_ids: Sequence[int]) -> Grids:
        grids = np.empty((len(image_ids), *SPEC.grid_shape), dtype=np.float16)
        for grid, image_id in zip(grids, image_ids, strict=True):
            descriptor, offset = files[image_id // ROWS_PER_SHARD]
            os.preadv(descriptor, [grid.data], offset + image_id % ROWS_PER_SHARD * grid.nbytes)
        return grids

    yield read
    for descriptor, _ in files:
        os.close(descriptor)


@contextmanager
def open_compressed(path: Path, store: FeatureStore, options: dict[str, Any]) -> Iterator[tuple[Reader, float]]:
    """Copy a store to one HDF5 dataset and yield its reader and the compression ratio.

    Args:
        path: HDF5 file to write.
        store: The store.
        options: Compression options of the dataset.
    """
    num_images, shape = len(store.image_ids), SPEC.grid_shape
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("grid", (num_images, *shape), "<f2", chunks=(1, *shape), **options)
        for start in range(0, num_images, ROWS_PER_SHARD):
            image_ids = store.image_ids[start : start + ROWS_PER_SHARD]
            dataset[start : start + len(image_ids)] = store.grids(image_ids)

    with h5py.File(path, "r") as file:
        dataset = file["grid"]

        def read(image_ids: Sequence[int]) -> Grids:
            grids = np.empty((len(image_ids), *shape), dtype=np.float16)
            for i, image_id in enumerate(image_ids):
                dataset.read_direct(grids, np.s_[image_id], np.s_[i])
            return grids

        yield read, dataset.nbytes / dataset.id.get_storage_size()


def measure_rates(readers: dict[str, Reader], batches: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    """Measure the rows per second of each reader in each round."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(NUM_ROUNDS):
        for name, read in readers.items():
            timed_batches = batches[:NUM_COMPRESSED_BATCHES] if name in COMPRESSIONS else batches
            start = time.perf_counter()
            for batch in timed_batches:
                read(batch)
            rates[name].append(len(timed_batches) * BATCH_SIZE / (time.perf_counter() - start))
    return rates


def drop_pages(paths: Sequence[Path]) -> None:
    """Drop the pages of files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_in_order(paths: Sequence[Path], num_bytes: int) -> None:
    """Read whole files until `num_bytes` are read."""
    size = 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while size < num_bytes and (block := file.read(2**23)):
                size += len(block)


def read_directly(rows: Sequence[tuple[Path, int]], row_size: int) -> None:
    """Read rows, given by file and number, without the page cache; all files have their rows at the same offset."""
    size = -(-row_size // PAGE_SIZE) * PAGE_SIZE
    buffers = threading.local()

    def read(path: Path, row: int) -> None:
        if not hasattr(buffers, "pages"):
            buffers.pages = mmap.mmap(-1, size)  # O_DIRECT needs aligned memory
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.preadv(descriptor, [buffers.pages], row * row_size // PAGE_SIZE * PAGE_SIZE)
        os.close(descriptor)

    with ThreadPoolExecutor(NUM_DIRECT_READERS) as executor:
        deque(executor.map(read, *zip(*rows, strict=True)), maxlen=0)


def read_from_disk(folder: Path) -> None:
    """Print gigabytes per second of a store whose pages are not in the page cache, and ratios to the rate in order."""
    store = FeatureStore(folder)
    paths = sorted({store.shard_path(image_id) for image_id in store.image_ids})
    num_rows = NUM_COLD_BATCHES * BATCH_SIZE
    row_size = store.spec.grid_bytes
    num_bytes = num_rows * row_size
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"FeatureStore": [], "direct": [], "sequential": []}
    for _ in range(NUM_COLD_ROUNDS):
        batches = rng.choice(store.image_ids, (NUM_COLD_BATCHES, BATCH_SIZE), replace=False).tolist()
        drop_pages(paths)
        start = time.perf_counter()
        for batch in batches:
            store.grids(batch)
        rates["FeatureStore"].append(num_bytes / (time.perf_counter() - start))
        drop_pages(paths)
        rows = [(store.shard_path(image_id), store.first_row(image_id)[1]) for batch in batches for image_id in batch]
        start = time.perf_counter()
        read_directly(rows, row_size)
        rates["direct"].append(num_bytes / (time.perf_counter() - start))
        drop_pages(paths)
        order = [paths[i] for i in rng.permutation(len(paths))]
        start = time.perf_counter()
        read_in_order(order, num_bytes)
        rates["sequential"].append(num_bytes / (time.perf_counter() - start))

    print(f"{len(store.image_ids):,} images in batches of {BATCH_SIZE}; medians of {NUM_COLD_ROUNDS} rounds")
    print(f"{'':>14} {'GB / s':>8} {'/ sequential':>14}")
    for name, measured in rates.items():
        ratio = median(a / b for a, b in zip(measured, rates["sequential"], strict=True))
        print(f"{name:>14} {median(measured) / 1e9:>8.2f} {ratio:>14.2f}")


def main(store_folder: Path | None) -> None:
    """Print rows and gigabytes per second of each reader, and their ratio to `preadv`.

    Args:
        store_folder: A store to read from the disk instead.
    """
    if store_folder is not None:
        read_from_disk(store_folder)
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        shards = write_store(Path(folder))
        store = FeatureStore(Path(folder))
        compression_ratios = {"FeatureStore": 1.0, "preadv": 1.0}
        readers: dict[str, Reader] = {
            "FeatureStore": store.grids,
            "preadv": stack.enter_context(open_with_preadv([shard.path for shard in shards])),
        }
        for i, (name, options) in enumerate(COMPRESSIONS.items()):
            path = Path(folder) / f"{i}.h5"
            readers[name], compression_ratios[name] = stack.enter_context(open_compressed(path, store, options))

        num_images = len(store.image_ids)
        order = np.random.default_rng(0).permutation(num_images)[: NUM_BATCHES * BATCH_SIZE]
        batches = order.reshape(NUM_BATCHES, -1).tolist()
        for name, read in readers.items():
            assert np.array_equal(read(batches[0]), readers["preadv"](batches[0])), name
        rates = measure_rates(readers, batches)

    row_size = np.prod(SPEC.grid_shape) * np.dtype(np.float16).itemsize
    print(
        f"reading {num_images} rows of 7 x 7 x 2048 float16 in batches of {BATCH_SIZE}; medians of {NUM_ROUNDS} rounds"
    )
    print(f"{'':>26} {'rows / s':>14} {'GB / s':>12} {'/ preadv':>10} {'compression':>13}")
    for name, measured in rates.items():
        rate = median(measured)
        ratio = median(a / b for a, b in zip(measured, rates["preadv"], strict=True))
        print(
            f"{name:>26} {rate:>14.0f} {rate * row_size / 1e9:>12.2f} {ratio:>10.3f} {compression_ratios[name]:>13.2f}"
        )
