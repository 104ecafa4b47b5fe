"""Encode the images of a dataset into a feature store, reusing all finished rows of earlier runs.

Images are identified by SHA-256. A run first digests all images and plans shards for the missing rows. The plan, and so
every byte of a shard, does not depend on the number of processes.

Shapes: B images of a batch, N views of one image, R rows of a shard, Y and X height and width of the encoder's input in
px, P regions of a grid, C channels.
"""

import json
import logging
import shutil
import time
from collections import Counter, deque
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

from pipeline.artifacts import file_digests, publish_together
from pipeline.captions.records import SPLITS, Policy, Record, Split
from pipeline.distributed import SINGLE_PROCESS, Processes
from pipeline.errors import NO_SPACE, UserError, no_space_message, summarize
from pipeline.features.adoption import adopt_shards, copying_cache
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
from pipeline.features.near_duplicates import (
    NearDuplicate,
    find_near_duplicates,
    read_near_duplicates,
    search_fingerprint,
    write_near_duplicates,
)
from pipeline.features.resnets import STRIDES
from pipeline.features.store import (
    EncoderSpec,
    FeatureStore,
    Grids,
    RowKey,
    Shard,
    intact_shards,
    write_index,
    write_shard,
)
from pipeline.features.views import Frame, View

logger = logging.getLogger("gridcap")

STAGE = "encode"
RUNS_FILE = "runs.jsonl"

# Limits the work that a kill can lose. It determines which rows share a file, and so the published bytes.
ROWS_PER_SHARD = 128

# Batches encoded at once, each on its share of the cores. When image decoding takes a core from one batch, its threads
# wait for each other, but the other batch continues. On a GPU each has a stream: one computes while another is copied.
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
    skipped: int
    """Number of images that cannot be decoded and were skipped."""
    failed: int
    """Number of images that could not be read."""

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in asdict(self).items())


@dataclass(frozen=True, kw_only=True)
class EncodeResult:
    """Counts of one run, and the finished store."""

    store: Path
    """Folder of the store, in the work folder."""
    counts: EncodeCounts
    num_images: int
    num_skipped_images: int
    num_shards: int
    views: tuple[View, ...]
    spec: EncoderSpec
    near_duplicates: dict[Split, int]
    """Number of images of val and test with a near-duplicate in another split; of rank 0 only."""

    @property
    def metrics(self) -> dict[str, int]:
        """Metrics of the store, independent of the number of runs."""
        return {
            "num_images": self.num_images,
            "num_skipped_images": self.num_skipped_images,
            "num_views": len(self.views),
            "num_shards": self.num_shards,
            "grid_height": self.spec.grid_height,
            "grid_width": self.spec.grid_width,
            "channels": self.spec.channels,
            "bytes_per_image": len(self.views) * self.spec.grid_bytes,
            **{f"{split}_num_near_duplicates": count for split, count in self.near_duplicates.items()},
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
    """uint8 [N, Y, X, 3]."""


@dataclass(frozen=True, kw_only=True)
class _SkippedImage:
    """An image file that cannot be decoded."""

    sha256: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """What a process made of its share of the plan."""

    shards: list[Shard]
    skipped: list[_SkippedImage]
    faults: list[str]
    """A message for each image that could not be read."""


@contextmanager
def encode(
    records: Sequence[Record],
    image_dir: Path,
    params: EncodeParams,
    work: Path,
    device: torch.device,
    num_threads: int,
    processes: Processes = SINGLE_PROCESS,
    bad_images: Policy = "error",
    published: Path | None = None,
) -> Iterator[EncodeResult]:
    """Encode the images of a dataset. The lock of the work folder is held while the caller publishes the store.

    Finished shards stay in the work folder for later runs, even if the dataset changes. Rows that it lacks are taken
    from the published store or from DVC's cache, if they are there. A row depends only on the bytes of the image file,
    the view and the encoder spec. All processes must call this with the same arguments on shared folders; rank 0
    writes the store.

    Args:
        records: Records of the images.
        image_dir: Folder that the records' files are relative to.
        params: Section `encode`.
        work: Root of the work folders. Each run appends a line to its file `encode/runs.jsonl`.
        device: Device of the encoder; int8 always uses the CPU.
        num_threads: Threads that read and decode images ahead of the encoder.
        processes: The processes that share the work.
        bad_images: Policy for images that can be read but not decoded. Skipped images are listed in the index.
        published: Folder of the published store, whose rows and those of its versions in DVC's cache are reused; None
            for no such store.

    Yields:
        Counts of the run, and the finished store in the work folder.

    Raises:
        UserError: The weights do not match, the disk is full, all images of a split are skipped, or an image is missing
            or unreadable, which is reported after all other images are encoded.
    """
    encoder = load_encoder(params)
    spec = encoder_spec(encoder, params)
    network = optimize_for_inference(encoder, params.precision, params.compile, device)
    # On a CPU, a compiled network uses all cores for each batch.
    concurrent_batches = 1 if runs_on_cpu(params.precision, device) and params.compile else CONCURRENT_BATCHES
    try:
        with processes.work_folder(work, STAGE, spec.fingerprint) as folder:
            job = _EncodeJob(
                folder=folder,
                spec=spec,
                views=params.views,
                network=network,
                device=device,
                concurrent_batches=concurrent_batches,
                num_threads=num_threads,
                processes=processes,
                bad_images=bad_images,
            )
            yield job.run(records, image_dir, published)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(
            f"{no_space_message(error, Path(error.filename or work))}. Free disk space and run again. Finished shards"
            " are kept."
        ) from error


def encoder_spec(encoder: GridEncoder, params: EncodeParams) -> EncoderSpec:
    """Return the spec of a loaded encoder."""
    frame = params.frame
    rows, columns = params.pooled or (side // STRIDES[params.layer] for side in (frame.height, frame.width))
    return EncoderSpec(
        architecture=params.architecture,
        layer=params.layer,
        weights_digest=weights_digest(encoder),
        image_height=frame.height,
        image_width=frame.width,
        resize=params.resize,
        precision=params.precision,
        compiled=params.compile,
        grid_height=rows,
        grid_width=columns,
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
    device: torch.device
    concurrent_batches: int
    """Number of batches encoded at once."""
    num_threads: int
    """Number of threads that read and decode images."""
    processes: Processes
    bad_images: Policy

    def run(self, records: Sequence[Record], image_dir: Path, published: Path | None) -> EncodeResult:
        """Encode the missing rows, and write the store unless an image is unreadable."""
        start = time.monotonic()
        records = sorted(records, key=lambda record: record.image_id)
        image_digests = self._digest_images(records, image_dir)
        needed_digests = set(image_digests.values())
        shards = self.processes.broadcast(
            self._stored_shards(needed_digests, published) if self.processes.is_main else []
        )
        known_undecodable = {digest for shard in shards for digest in shard.undecodable}
        missing = self._missing_keys(needed_digests, shards)
        plan = self._plan(records, image_dir, image_digests, missing, known_undecodable)
        del missing
        num_reused = len(records) - sum(map(len, plan))
        if self.processes.is_main:
            logger.info("%s: %d of %d images are already encoded", STAGE, num_reused, len(records))
        fault = self._find_space_fault(plan, len(records), published) if self.processes.is_main else None
        if fault := self.processes.broadcast(fault):
            raise UserError(fault)
        encoded = self._encode_plan(plan)
        undecodable = {image.sha256 for image in encoded.skipped}
        skipped_ids = [image_id for image_id, digest in image_digests.items() if digest in undecodable]
        counts = EncodeCounts(
            # Each planned image has other bytes, and all of its missing rows are in one shard.
            encoded=sum(len({digest for digest, _ in shard.keys}) for shard in encoded.shards),
            # Of skipped images with the same bytes, only one was in the plan.
            reused=num_reused - (len(skipped_ids) - len(undecodable)),
            removed=len({key for shard in shards for key in shard.keys if not self._is_needed(key, needed_digests)}),
            skipped=len(skipped_ids),
            failed=len(encoded.faults),
        )
        used_shards = [
            shard
            for shard in [*shards, *encoded.shards]
            if any(self._is_needed(key, needed_digests) for key in shard.keys)
        ]
        used_shards.sort(key=lambda shard: shard.path.name)
        num_shards = len(used_shards)
        if self.processes.is_main:
            self._append_to_runs(counts, time.monotonic() - start)
        if encoded.faults:
            raise UserError(*_describe_faults(encoded.faults, len(records), counts))
        _check_splits_not_empty(records, skipped_ids, image_dir)
        near_duplicates: dict[Split, int] = {}
        # For COCO each of these takes some 10 MB, and so does the index, which is written and read next.
        del plan, needed_digests, shards
        encoded.shards.clear()
        if self.processes.is_main:
            self._write_store(used_shards, image_digests, skipped_ids)
            del used_shards, image_digests
            near_duplicates = self._find_near_duplicates(records)
            logger.info("%s: %s", STAGE, counts)
            if encoded.skipped:
                reasons = summarize([image.reason for image in encoded.skipped], _MAX_LISTED_FAULTS)
                logger.warning("%s: %d images are skipped: %s", STAGE, len(skipped_ids), reasons)
        return EncodeResult(
            store=self._store,
            counts=counts,
            num_images=len(records) - len(skipped_ids),
            num_skipped_images=len(skipped_ids),
            num_shards=num_shards,
            views=self.views,
            spec=self.spec,
            near_duplicates=near_duplicates,
        )

    def _stored_shards(self, needed_digests: Set[str], published: Path | None) -> list[Shard]:
        """Return the shards of the work folder, and adopt others if it lacks rows."""
        shards = intact_shards(self.folder, self.spec)
        if published is None:
            return shards
        undecodable = {digest for shard in shards for digest in shard.undecodable}
        missing = self._missing_keys(needed_digests - undecodable, shards)
        return [*shards, *adopt_shards(self.folder, self.spec, missing, published)]

    def _missing_keys(self, needed_digests: Set[str], shards: Sequence[Shard]) -> set[RowKey]:
        """Return the keys of images that no shard has."""
        missing: set[RowKey] = {(digest, view) for digest in needed_digests for view in self.views}
        for shard in shards:
            missing.difference_update(shard.keys)
        return missing

    def _is_needed(self, key: RowKey, needed_digests: Set[str]) -> bool:
        digest, view = key
        return digest in needed_digests and view in self.views

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
        self,
        records: Sequence[Record],
        image_dir: Path,
        image_digests: Mapping[int, str],
        missing: Set[RowKey],
        known_undecodable: Set[str],
    ) -> list[list[_PlannedImage]]:
        """Assign images with missing rows to new shards, by ascending id. Equal files are encoded once.

        Images that an earlier run could not decode are last, in shards of their own: the other shards have the rows
        that they would have had without an interruption.
        """
        retried = [record for record in records if image_digests[record.image_id] in known_undecodable]
        new = [record for record in records if image_digests[record.image_id] not in known_undecodable]
        plan: list[list[_PlannedImage]] = []
        planned: set[str] = set()
        for part in (new, retried):
            num_rows = ROWS_PER_SHARD  # of the last shard in the plan
            for record in part:
                digest = image_digests[record.image_id]
                views = tuple(view for view in self.views if (digest, view) in missing)
                views = self.views if views == self.views else views  # one tuple for all
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

    def _find_space_fault(
        self, plan: Sequence[Sequence[_PlannedImage]], num_images: int, published: Path | None
    ) -> str | None:
        """Log the size of the store, and return a message if the disk does not hold the planned grids."""
        image_bytes = len(self.views) * self.spec.grid_bytes
        logger.info(
            "%s: %s bytes per image, %s bytes in all", STAGE, f"{image_bytes:,}", f"{num_images * image_bytes:,}"
        )
        needed = sum(len(image.views) for images in plan for image in images) * self.spec.grid_bytes
        if needed == 0:
            return None
        free = shutil.disk_usage(self.folder).free
        cache = None if published is None else copying_cache(published)
        in_cache = cache is not None and cache.is_dir() and cache.stat().st_dev == self.folder.stat().st_dev
        total = 2 * needed if in_cache else needed
        if total <= free:
            return None
        return (
            f"{self.folder}: the grids need {total:,} bytes{', DVC cache included' if in_cache else ''}, but"
            f" {free:,} bytes are free. Free disk space, or reduce encode.image_size, encode.views or encode.pool."
        )

    def _encode_plan(self, plan: Sequence[Sequence[_PlannedImage]]) -> _Encoded:
        """Encode the planned shards, divided among the processes, and return the results of all processes."""
        share = plan[self.processes.rank :: self.processes.world_size]
        num_rows = sum(len(image.views) for images in share for image in images)
        disable = None if self.processes.is_main else True
        with (
            ThreadPoolExecutor(self.num_threads) as decoders,
            _batch_executor(self.concurrent_batches if num_rows > IMAGES_PER_BATCH else 1, self.device) as encoders,
            tqdm(total=num_rows, desc=f"{STAGE}, grids", unit="grid", disable=disable) as progress,
        ):
            results = self.processes.gather(self._encode_shards(share, decoders, encoders, progress))
        return _Encoded(
            shards=[shard for result in results for shard in result.shards],
            skipped=[image for result in results for image in result.skipped],
            faults=[fault for result in results for fault in result.faults],
        )

    def _encode_shards(
        self,
        plan: Sequence[Sequence[_PlannedImage]],
        decoders: ThreadPoolExecutor,
        encoders: ThreadPoolExecutor,
        progress: "tqdm[NoReturn]",
    ) -> _Encoded:
        """Encode the shards of this process, while the images of the next shard are decoded.

        A shard with an unreadable image is not written, so that its bytes never depend on the fault. A shard lacks the
        images that are skipped.
        """

        def decode(images: Sequence[_PlannedImage]) -> list[Future[_DecodedImage | _SkippedImage | UserError]]:
            return [decoders.submit(_decode, image, self.spec.frame, self.bad_images) for image in images]

        encoded = _Encoded(shards=[], skipped=[], faults=[])
        remaining = iter(plan)
        decoding = deque(decode(images) for images in islice(remaining, _PREFETCHED_SHARDS))
        while decoding:
            results = [future.result() for future in decoding.popleft()]
            images = [result for result in results if isinstance(result, _DecodedImage)]
            skipped = [result for result in results if isinstance(result, _SkippedImage)]
            faults = [str(result) for result in results if isinstance(result, UserError)]
            encoded.skipped.extend(skipped)
            encoded.faults.extend(faults)
            grids = self._encode_images(images, encoders, progress) if images and not faults else None
            # Decode the next shard while this one is written.
            decoding.extend(decode(images) for images in islice(remaining, 1))
            if grids is not None:
                encoded.shards.append(self._write_shard(images, grids, [image.sha256 for image in skipped]))
        return encoded

    def _encode_images(
        self, images: Sequence[_DecodedImage], encoders: ThreadPoolExecutor, progress: "tqdm[NoReturn]"
    ) -> Grids:
        """Encode the views of images: float16 [R, P, C]."""
        pixels = np.concatenate([image.pixels for image in images])  # [R, Y, X, 3]
        grids = np.empty((len(pixels), *self.spec.grid_shape), dtype=np.float16)  # [R, P, C]

        def encode_from(start: int) -> int:
            batch = pixels[start : start + IMAGES_PER_BATCH]  # [B, Y, X, 3]
            grids[start : start + len(batch)] = encode_batch(self.network, batch)
            return len(batch)

        for num_encoded in encoders.map(encode_from, range(0, len(pixels), IMAGES_PER_BATCH)):
            progress.update(num_encoded)
        return grids

    def _write_shard(self, images: Sequence[_DecodedImage], grids: Grids, undecodable: Sequence[str]) -> Shard:
        rows = [(image.planned, view) for image in images for view in image.planned.views]
        image_ids = [image.image_id for image, _ in rows]
        keys = [(image.sha256, view) for image, view in rows]
        return write_shard(self.folder, self.spec, image_ids, keys, grids, undecodable)

    @property
    def _store(self) -> Path:
        return self.folder / "store"

    def _write_store(
        self, shards: Sequence[Shard], image_digests: Mapping[int, str], skipped_ids: Sequence[int]
    ) -> None:
        shutil.rmtree(self._store, ignore_errors=True)
        publish_together({self._store / shard.path.name: shard.path for shard in shards})
        write_index(self._store, self.spec, self.views, shards, image_digests, skipped_ids)

    def _find_near_duplicates(self, records: Sequence[Record]) -> dict[Split, int]:
        """Write the near-duplicates of the store, warn of them, and count them by split."""
        by_id = {record.image_id: record for record in records}
        splits = {image_id: record.split for image_id, record in by_id.items()}
        # At 123,287 images the search takes most of a minute, so its last result is kept.
        results = self.folder / "near_duplicates"
        last_result = results / search_fingerprint(self._store, splits)
        try:
            found = read_near_duplicates(last_result)
        except UserError:
            found = find_near_duplicates(FeatureStore(self._store), splits, f"{STAGE}, near-duplicates")
            shutil.rmtree(results, ignore_errors=True)
            write_near_duplicates(last_result, found)
        write_near_duplicates(self._store, found)
        if found:
            logger.warning(
                "%s: images of val or test that nearly equal an image of another split (%d): %s. Scores on them are not"
                " of unseen images. Remove them, or assign both to one split.",
                STAGE,
                len(found),
                summarize([_describe_near_duplicate(pair, by_id) for pair in found]),
            )
        counts = Counter(splits[pair.image_id] for pair in found)
        return {split: counts[split] for split in SPLITS if split != "train"}

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
def _batch_executor(num_workers: int, device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Make a pool of threads that encode one batch each, on a share of this thread's cores or on a stream of a GPU."""
    num_cores = torch.get_num_threads()
    if device.type == "cpu":
        num_workers = min(num_workers, num_cores)

    def initialize() -> None:
        torch.set_num_threads(-(-num_cores // num_workers))
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))  # which copied the weights
            torch.cuda.set_stream(stream)

    try:
        with ThreadPoolExecutor(num_workers, initializer=initialize) as executor:
            yield executor
    finally:
        # set_num_threads also sets the default of new threads.
        torch.set_num_threads(num_cores)


def _decode(image: _PlannedImage, frame: Frame, bad_images: Policy) -> _DecodedImage | _SkippedImage | UserError:
    try:
        content = read_image_file(image.path)
    except UserError as error:
        return error
    if sha256(content).hexdigest() != image.sha256:
        return UserError(f"{image.path}: changed during the run. Run again.")
    try:
        return _DecodedImage(planned=image, pixels=read_views(content, frame, image.views, str(image.path)))
    except UserError as error:
        return error if bad_images == "error" else _SkippedImage(sha256=image.sha256, reason=str(error))


def _describe_near_duplicate(pair: NearDuplicate, records: Mapping[int, Record]) -> str:
    image, other = records[pair.image_id], records[pair.other_id]
    return f"{image.file} ({image.split}) and {other.file} ({other.split})"


def _check_splits_not_empty(records: Sequence[Record], skipped_ids: Sequence[int], image_dir: Path) -> None:
    skipped = set(skipped_ids)
    for split in SPLITS:
        image_ids = {record.image_id for record in records if record.split == split}
        if image_ids and image_ids <= skipped:
            raise UserError(
                f"{image_dir}: none of the {len(image_ids)} images of split {split} can be decoded. Replace the files;"
                " dataset.bad_images=error lists them."
            )


def _describe_faults(faults: Sequence[str], num_images: int, counts: EncodeCounts) -> list[str]:
    num_unlisted = len(faults) - _MAX_LISTED_FAULTS
    return [
        f"{len(faults)} of {num_images} images cannot be encoded:",
        *(f"  {fault}" for fault in faults[:_MAX_LISTED_FAULTS]),
        *([f"  and {num_unlisted} more"] if num_unlisted > 0 else []),
        f"Nothing is published. Finished shards are kept ({counts}).",
        "Replace the files. dataset.bad_images=skip leaves out those that cannot be decoded.",
    ]
