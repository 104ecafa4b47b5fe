"""Encode the images of a dataset into a feature store, reusing all finished rows of earlier runs.

Images are identified by SHA-256. A run first digests all images and plans shards for the missing rows. The plan, and so
every byte of a shard, does not depend on the number of processes.

Shapes: B images of a batch, N views of one image, R rows of a shard, S side of the image in px, P regions of a grid,
C channels.
"""

import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from pipeline.artifacts import file_digests, publish
from pipeline.captions.records import Record
from pipeline.distributed import SINGLE_PROCESS, Processes
from pipeline.errors import NO_SPACE, UserError, no_space_message
from pipeline.features.encoder import (
    IMAGES_PER_BATCH,
    EncodeParams,
    GridEncoder,
    encode_batch,
    load_encoder,
    optimize_for_inference,
    runs_on_cpu,
    weights_digest,
)
from pipeline.features.images import Pixels, read_image_file, read_views
from pipeline.features.resnets import STRIDES
from pipeline.features.store import EncoderSpec, Grids, RowKey, Shard, intact_shards, write_index, write_shard
from pipeline.features.views import View

logger = logging.getLogger("gridcap")

STAGE = "encode"
RUNS_FILE = "runs.jsonl"

# Limits the work that a kill can lose. It determines which rows share a file, and so the published bytes.
ROWS_PER_SHARD = 128

# Batches encoded at once, each on its share of the cores. When image decoding takes a core from one batch, its threads
# wait for each other, but the other batch continues.
CONCURRENT_BATCHES = 2

# Shards whose images are decoded at once: the shard being encoded and the next.
_PREFETCHED_SHARDS = 2

_MAX_LISTED_FAULTS = 5


@dataclass(frozen=True, kw_only=True)
class EncodeCounts:
    """Counts of one run."""

    encoded: int
    """Number of encoded images."""
    reused: int
    """Number of images without missing rows, because of an earlier run or of a file with the same bytes."""
    removed: int
    """Number of rows of earlier runs that no image uses any more."""
    failed: int
    """Number of images that could not be read."""

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in asdict(self).items())


@dataclass(frozen=True, kw_only=True)
class EncodeResult:
    """Counts of one run, and the published store."""

    counts: EncodeCounts
    num_images: int
    num_shards: int
    views: tuple[View, ...]
    spec: EncoderSpec

    @property
    def metrics(self) -> dict[str, int]:
        """Metrics of the store, independent of the number of runs."""
        num_regions, channels = self.spec.grid_shape
        return {
            "num_images": self.num_images,
            "num_views": len(self.views),
            "num_shards": self.num_shards,
            "grid_height": self.spec.grid_height,
            "grid_width": self.spec.grid_width,
            "channels": channels,
            "bytes_per_image": len(self.views) * num_regions * channels * np.dtype(np.float16).itemsize,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _PlannedImage:
    """An image file with missing rows."""

    image_id: int
    image_dir: Path
    file: str
    """Path relative to `image_dir`. A `Path` would take 400 bytes per image."""
    sha256: str
    views: tuple[View, ...]
    """Views whose rows are missing."""

    @property
    def path(self) -> Path:
        """The image file."""
        return self.image_dir / self.file


@dataclass(frozen=True, kw_only=True)
class _DecodedImage:
    planned: _PlannedImage
    pixels: Pixels
    """uint8 [N, S, S, 3]."""


def encode(
    records: Sequence[Record],
    image_dir: Path,
    params: EncodeParams,
    work: Path,
    out: Path,
    device: torch.device,
    num_threads: int,
    processes: Processes = SINGLE_PROCESS,
) -> EncodeResult:
    """Encode the images of a dataset and publish the feature store.

    Finished shards stay in the work folder for later runs, even if the dataset changes. A row depends only on the bytes
    of the image file, the view and the encoder spec. All processes must call this with the same arguments on shared
    folders; rank 0 publishes.

    Args:
        records: Records of the images.
        image_dir: Folder that the records' files are relative to.
        params: Section `encode`.
        work: Root of the work folders. Each run appends a line to its file `encode/runs.jsonl`.
        out: Folder of the store, which is replaced at the end.
        device: Device of the encoder; int8 always uses the CPU.
        num_threads: Threads that read and decode images ahead of the encoder.
        processes: The processes that share the work.

    Raises:
        UserError: The weights do not match, the disk is full, or an image is missing or unreadable, which is reported
            after all other images are encoded. `out` is then unchanged.
    """
    encoder = load_encoder(params)
    spec = encoder_spec(encoder, params)
    network = optimize_for_inference(encoder, params.precision, params.compile, device)
    # A compiled network uses all cores for each batch.
    concurrent_batches = CONCURRENT_BATCHES if runs_on_cpu(params.precision, device) and not params.compile else 1
    try:
        with processes.work_folder(work, STAGE, spec.fingerprint) as folder:
            job = _EncodeJob(
                folder=folder,
                spec=spec,
                views=params.views,
                network=network,
                concurrent_batches=concurrent_batches,
                num_threads=num_threads,
                processes=processes,
            )
            return job.run(records, image_dir, out)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(
            f"{no_space_message(error, Path(error.filename or work))}. Free disk space and run again. Finished shards"
            " are kept."
        ) from error


def encoder_spec(encoder: GridEncoder, params: EncodeParams) -> EncoderSpec:
    """Return the spec of a loaded encoder."""
    grid_side = params.image_size // STRIDES[params.layer]
    return EncoderSpec(
        architecture=params.architecture,
        layer=params.layer,
        weights_digest=weights_digest(encoder),
        image_size=params.image_size,
        precision=params.precision,
        compiled=params.compile,
        grid_height=grid_side,
        grid_width=grid_side,
        channels=encoder.channels,
    )


@dataclass(frozen=True, kw_only=True)
class _EncodeJob:
    """One run of all processes in the work folder of one encoder spec."""

    folder: Path
    """Work folder of the spec."""
    spec: EncoderSpec
    views: tuple[View, ...]
    network: nn.Module
    """Encoder, from `optimize_for_inference`."""
    concurrent_batches: int
    """Number of batches encoded at once."""
    num_threads: int
    """Number of threads that read and decode images."""
    processes: Processes

    def run(self, records: Sequence[Record], image_dir: Path, out: Path) -> EncodeResult:
        """Encode the missing rows, and publish the store unless an image is unreadable."""
        start = time.monotonic()
        records = sorted(records, key=lambda record: record.image_id)
        shards = self.processes.broadcast(intact_shards(self.folder, self.spec) if self.processes.is_main else [])
        stored_keys = {key for shard in shards for key in shard.keys}
        image_digests = self._digest_images(records, image_dir)
        plan = self._plan(records, image_dir, image_digests, stored_keys)
        num_reused = len(records) - sum(map(len, plan))
        if self.processes.is_main:
            logger.info("%s: %d of %d images are already encoded", STAGE, num_reused, len(records))
        new_shards, faults = self._encode_plan(plan)
        needed_keys = {(digest, view) for digest in image_digests.values() for view in self.views}
        counts = EncodeCounts(
            encoded=_count_encoded(plan, new_shards),
            reused=num_reused,
            removed=len(stored_keys - needed_keys),
            failed=len(faults),
        )
        used_shards = [shard for shard in [*shards, *new_shards] if not needed_keys.isdisjoint(shard.keys)]
        used_shards.sort(key=lambda shard: shard.path.name)
        if self.processes.is_main:
            self._append_to_runs(counts, time.monotonic() - start)
            if not faults:
                self._publish(used_shards, image_digests, out)
                logger.info("%s: %s", STAGE, counts)
        if faults:
            raise UserError(*_describe_faults(faults, len(records), counts))
        return EncodeResult(
            counts=counts,
            num_images=len(records),
            num_shards=len(used_shards),
            views=self.views,
            spec=self.spec,
        )

    def _digest_images(self, records: Sequence[Record], image_dir: Path) -> dict[int, str]:
        """Map image ids to the SHA-256 of their files, or to a unique placeholder for an unreadable file."""
        share = records[self.processes.rank :: self.processes.world_size]
        paths = [f"{image_dir}/{record.file}" for record in share]
        silent = not self.processes.is_main
        results = file_digests(paths, f"{STAGE}, digests", "image", self.num_threads, silent=silent)
        digests = {
            record.image_id: result if isinstance(result, str) else f"unreadable {record.image_id}"
            for record, result in zip(share, results, strict=True)
        }
        return {image_id: digest for part in self.processes.gather(digests) for image_id, digest in part.items()}

    def _plan(
        self, records: Sequence[Record], image_dir: Path, image_digests: Mapping[int, str], stored_keys: Set[RowKey]
    ) -> list[list[_PlannedImage]]:
        """Assign images with missing rows to new shards, by ascending id. Equal files are encoded once."""
        plan: list[list[_PlannedImage]] = []
        num_rows = ROWS_PER_SHARD  # of the last shard in the plan
        planned: set[str] = set()
        for record in records:
            digest = image_digests[record.image_id]
            views = tuple(view for view in self.views if (digest, view) not in stored_keys)
            if not views or digest in planned:
                continue
            planned.add(digest)
            if num_rows >= ROWS_PER_SHARD:
                plan.append([])
                num_rows = 0
            plan[-1].append(
                _PlannedImage(
                    image_id=record.image_id, image_dir=image_dir, file=record.file, sha256=digest, views=views
                )
            )
            num_rows += len(views)
        return plan

    def _encode_plan(self, plan: Sequence[Sequence[_PlannedImage]]) -> tuple[list[Shard], list[str]]:
        """Encode the planned shards, divided among the processes.

        Returns:
            The shards written by all processes, and a message for each unreadable image.
        """
        share = plan[self.processes.rank :: self.processes.world_size]
        num_rows = sum(len(image.views) for images in share for image in images)
        disable = None if self.processes.is_main else True
        with (
            ThreadPoolExecutor(self.num_threads) as decoders,
            _batch_executor(self.concurrent_batches if num_rows > IMAGES_PER_BATCH else 1) as encoders,
            tqdm(total=num_rows, desc=f"{STAGE}, grids", unit="grid", disable=disable) as progress,
        ):
            results = self.processes.gather(self._encode_shards(share, decoders, encoders, progress))
        return [shard for part, _ in results for shard in part], [fault for _, part in results for fault in part]

    def _encode_shards(
        self,
        plan: Sequence[Sequence[_PlannedImage]],
        decoders: ThreadPoolExecutor,
        encoders: ThreadPoolExecutor,
        progress: "tqdm[NoReturn]",
    ) -> tuple[list[Shard], list[str]]:
        """Encode the shards of this process, while the images of the next shard are decoded.

        A shard with an unreadable image is not written, so that its bytes never depend on the fault.
        """

        def decode(images: Sequence[_PlannedImage]) -> list[Future[_DecodedImage | UserError]]:
            return [decoders.submit(_decode, image, self.spec.image_size) for image in images]

        shards, faults = [], []
        remaining = iter(plan)
        decoding = deque(decode(images) for images in islice(remaining, _PREFETCHED_SHARDS))
        while decoding:
            results = [future.result() for future in decoding.popleft()]
            images = [result for result in results if isinstance(result, _DecodedImage)]
            shard_faults = [str(result) for result in results if isinstance(result, UserError)]
            faults += shard_faults
            grids = None if shard_faults else self._encode_images(images, encoders, progress)
            # Decode the next shard while this one is written.
            decoding.extend(decode(images) for images in islice(remaining, 1))
            if grids is not None:
                shards.append(self._write_shard(images, grids))
        return shards, faults

    def _encode_images(
        self, images: Sequence[_DecodedImage], encoders: ThreadPoolExecutor, progress: "tqdm[NoReturn]"
    ) -> Grids:
        """Encode the views of images: float16 [R, P, C]."""
        pixels = np.concatenate([image.pixels for image in images])  # [R, S, S, 3]
        grids = np.empty((len(pixels), *self.spec.grid_shape), dtype=np.float16)  # [R, P, C]

        def encode_from(start: int) -> int:
            batch = pixels[start : start + IMAGES_PER_BATCH]  # [B, S, S, 3]
            grids[start : start + len(batch)] = encode_batch(self.network, batch)
            return len(batch)

        for num_encoded in encoders.map(encode_from, range(0, len(pixels), IMAGES_PER_BATCH)):
            progress.update(num_encoded)
        return grids

    def _write_shard(self, images: Sequence[_DecodedImage], grids: Grids) -> Shard:
        rows = [(image.planned, view) for image in images for view in image.planned.views]
        image_ids = [image.image_id for image, _ in rows]
        return write_shard(self.folder, self.spec, image_ids, [(image.sha256, view) for image, view in rows], grids)

    def _publish(self, shards: Sequence[Shard], image_digests: Mapping[int, str], out: Path) -> None:
        staged = self.folder / "published"
        shutil.rmtree(staged, ignore_errors=True)
        for shard in shards:
            publish(shard.path, staged / shard.path.name)
        write_index(staged, self.spec, self.views, shards, image_digests)
        publish(staged, out)

    def _append_to_runs(self, counts: EncodeCounts, seconds: float) -> None:
        line = {
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": self.spec.fingerprint,
            **asdict(counts),
            "seconds": round(seconds, 1),
            "processes": self.processes.world_size,
        }
        with (self.folder.parent / RUNS_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")


@contextmanager
def _batch_executor(num_workers: int) -> Iterator[ThreadPoolExecutor]:
    """Make a pool of threads that encode one batch each and share the cores of this thread."""
    num_cores = torch.get_num_threads()
    num_workers = min(num_workers, num_cores)
    cores_per_worker = -(-num_cores // num_workers)
    try:
        with ThreadPoolExecutor(
            num_workers, initializer=torch.set_num_threads, initargs=(cores_per_worker,)
        ) as executor:
            yield executor
    finally:
        # set_num_threads also sets the default of new threads.
        torch.set_num_threads(num_cores)


def _decode(image: _PlannedImage, size: int) -> _DecodedImage | UserError:
    try:
        content = read_image_file(image.path)
        if sha256(content).hexdigest() != image.sha256:
            return UserError(f"{image.path}: changed during the run. Run again.")
        return _DecodedImage(planned=image, pixels=read_views(content, size, image.views, str(image.path)))
    except UserError as error:
        return error


def _count_encoded(plan: Sequence[Sequence[_PlannedImage]], shards: Sequence[Shard]) -> int:
    """Count the planned images whose rows are all in the new shards."""
    keys = {key for shard in shards for key in shard.keys}
    return sum(all((image.sha256, view) in keys for view in image.views) for images in plan for image in images)


def _describe_faults(faults: Sequence[str], num_images: int, counts: EncodeCounts) -> list[str]:
    num_unlisted = len(faults) - _MAX_LISTED_FAULTS
    return [
        f"{len(faults)} of {num_images} images cannot be encoded:",
        *(f"  {fault}" for fault in faults[:_MAX_LISTED_FAULTS]),
        *([f"  and {num_unlisted} more"] if num_unlisted > 0 else []),
        f"Nothing is published. Finished shards are kept ({counts}).",
    ]
