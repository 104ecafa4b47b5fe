"""All images of a dataset through the encoder, once: a run takes up every row that earlier ones finished.

Images are told apart by their bytes. A run first digests all of them and plans shards of what no finished shard
holds; the plan, and so every byte of a shard, is the same whichever process of how many encodes it, and when.

B pictures a batch, S side of the picture in px, P regions of a grid, C channels.
"""

import json
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
from pipeline.errors import NO_SPACE, UserError
from pipeline.features.encoder import (
    IMAGES_PER_BATCH,
    STRIDES,
    EncodeParams,
    GridEncoder,
    encode_batch,
    for_inference,
    load_encoder,
    runs_on_cpu,
    weights_digest,
)
from pipeline.features.images import Pixels, View, read_bytes, read_views
from pipeline.features.store import EncoderSpec, Grids, RowKey, Shard, intact_shards, write_index, write_shard

STAGE = "encode"
RUNS_FILE = "runs.jsonl"
# What a kill may cost, and, as it decides which rows share a file, part of the published bytes.
ROWS_PER_SHARD = 128

# Batches encoded at once, each by its share of the processors: where decoding takes one from a batch, its others wait
# for that one, but those of the other batch go on.
CONCURRENT_BATCHES = 2

# Whose pictures are read: the one encoded and the next, and one more while a shard is written.
_SHARDS_AHEAD = 2

_FAULTS_TOLD = 5


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What one run did."""

    encoded: int
    """Images that went through the ResNet."""
    reused: int
    """Images all of whose rows earlier runs, or an equal file, had made."""
    removed: int
    """Rows of earlier runs that no image needs any more."""
    failed: int
    """Images that could not be read."""

    def __str__(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in asdict(self).items())


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a run did, and what it published."""

    counts: Counts
    images: int
    shards: int
    """Files published."""
    views: tuple[View, ...]
    spec: EncoderSpec

    @property
    def metrics(self) -> dict[str, int]:
        """What describes the store, however many runs it took."""
        regions, channels = self.spec.grid_shape
        return {
            "images": self.images,
            "views": len(self.views),
            "shards": self.shards,
            "grid_height": self.spec.grid_height,
            "grid_width": self.spec.grid_width,
            "channels": channels,
            "bytes_an_image": len(self.views) * regions * channels * np.dtype(np.float16).itemsize,
        }


@dataclass(frozen=True, kw_only=True)
class _Image:
    """An image file of which rows are missing."""

    image_id: int
    path: Path
    content: str
    """SHA-256 of its bytes."""
    views: tuple[View, ...]
    """Those that are missing."""


@dataclass(frozen=True, kw_only=True)
class _Picture:
    image: _Image
    pixels: Pixels
    """uint8 [views, S, S, 3]."""


def encode(
    records: Sequence[Record],
    images: Path,
    params: EncodeParams,
    work: Path,
    out: Path,
    device: torch.device,
    threads: int,
    processes: Processes = SINGLE_PROCESS,
) -> Encoded:
    """Encode the records' images below the folder `images` and publish them as a feature store at `out`.

    Finished shards stay in a folder of `work`, where a run after a kill, or of a changed dataset, finds them; what
    each run did is a line of `RUNS_FILE` there. A row depends on the image's bytes, the view and the encoder
    setting alone. `threads` read and decode images ahead of the encoder. All `ranks` call this with the same
    arguments and folders; the first publishes.

    Raises `UserError` for weights that do not fit, for a full disk, and, when all else is encoded, for images that
    are missing or unreadable; what stood at `out` then stands there still.
    """
    encoder = load_encoder(params)
    spec = encoder_setting(encoder, params)
    network = for_inference(encoder, params.precision, params.compile, device)
    # Compiled, it takes all processors whoever calls it.
    lanes = CONCURRENT_BATCHES if runs_on_cpu(params.precision, device) and not params.compile else 1
    try:
        with processes.work_folder(work, STAGE, spec.fingerprint) as folder:
            return _Run(folder, spec, params.views, network, lanes, threads, processes).encode(records, images, out)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(
            f"{error.filename or work}: cannot be written ({error.strerror}); free space and run again:"
            " finished shards are kept"
        ) from error


def encoder_setting(encoder: GridEncoder, params: EncodeParams) -> EncoderSpec:
    """Tell the setting of the features that a loaded encoder gives."""
    side = params.image_size // STRIDES[params.layer]
    return EncoderSpec(
        architecture=params.architecture,
        layer=params.layer,
        weights_digest=weights_digest(encoder),
        image_size=params.image_size,
        precision=params.precision,
        compiled=params.compile,
        grid_height=side,
        grid_width=side,
        channels=encoder.channels,
    )


class _Run:
    """One run of all ranks, in the work folder of one encoder setting."""

    def __init__(
        self,
        folder: Path,
        spec: EncoderSpec,
        views: tuple[View, ...],
        network: nn.Module,
        lanes: int,
        threads: int,
        processes: Processes,
    ) -> None:
        self._folder = folder
        self._spec = spec
        self._views = views
        self._network = network
        self._lanes = lanes
        self._threads = threads
        self._processes = processes

    def encode(self, records: Sequence[Record], images: Path, out: Path) -> Encoded:
        began = time.monotonic()
        records = sorted(records, key=lambda record: record.image_id)
        shards = self._processes.broadcast(intact_shards(self._folder) if self._processes.is_main else [])
        stored = {key for shard in shards for key in shard.keys}
        contents = self._digests(records, images)
        plan = self._plan(records, images, contents, stored)
        planned = sum(map(len, plan))
        if self._processes.is_main:
            print(f"{STAGE}: {len(records) - planned} of {len(records)} images are stored already", flush=True)
        made, faults = self._encode_shards(plan)
        shards += made
        needed = {(content, view) for content in contents.values() for view in self._views}
        new = {key for shard in made for key in shard.keys}
        counts = Counts(
            encoded=sum(all((image.content, view) in new for view in image.views) for group in plan for image in group),
            reused=len(records) - planned,
            removed=len(stored - needed),
            failed=len(faults),
        )
        used = sorted((s for s in shards if not needed.isdisjoint(s.keys)), key=lambda shard: shard.path.name)
        if self._processes.is_main:
            self._record(counts, time.monotonic() - began)
            if not faults:
                self._publish(used, contents, out)
        if faults:
            raise UserError(_told(faults, counts))
        return Encoded(counts=counts, images=len(records), shards=len(used), views=self._views, spec=self._spec)

    def _digests(self, records: Sequence[Record], images: Path) -> dict[int, str]:
        """SHA-256 of each image's file; a name of its own for one that cannot be read."""
        own = records[self._processes.rank :: self._processes.world_size]
        paths = [images / record.file for record in own]
        digests = file_digests(paths, f"{STAGE}, digests", "image", self._threads, silent=not self._processes.is_main)
        found = {
            record.image_id: digest if isinstance(digest, str) else f"unreadable {record.image_id}"
            for record, digest in zip(own, digests, strict=True)
        }
        return {image_id: content for part in self._processes.gather(found) for image_id, content in part.items()}

    def _plan(
        self, records: Sequence[Record], images: Path, contents: Mapping[int, str], stored: Set[RowKey]
    ) -> list[list[_Image]]:
        """For each shard to write its images, by ascending id; of equal files the first stands for all."""
        plan: list[list[_Image]] = []
        rows = ROWS_PER_SHARD
        planned: set[str] = set()
        for record in records:
            content = contents[record.image_id]
            views = tuple(view for view in self._views if (content, view) not in stored)
            if not views or content in planned:
                continue
            planned.add(content)
            if rows >= ROWS_PER_SHARD:
                plan.append([])
                rows = 0
            plan[-1].append(_Image(image_id=record.image_id, path=images / record.file, content=content, views=views))
            rows += len(views)
        return plan

    def _encode_shards(self, plan: Sequence[Sequence[_Image]]) -> tuple[list[Shard], list[str]]:
        """Write the plan's shards, each rank its share; returns those of all, and a sentence for each bad image.

        A shard of which an image cannot be read is left for the next run: mended, it is what it would have been.
        """
        own = plan[self._processes.rank :: self._processes.world_size]
        rows = sum(len(image.views) for group in own for image in group)
        shards, faults = [], []
        with (
            ThreadPoolExecutor(self._threads) as readers,
            _side_by_side(self._lanes if rows > IMAGES_PER_BATCH else 1) as encoders,
            tqdm(
                total=rows,
                desc=f"{STAGE}, grids",
                unit="grid",
                disable=None if self._processes.is_main else True,
            ) as bar,
        ):

            def read(group: Sequence[_Image]) -> list[Future[_Picture | UserError]]:
                return [readers.submit(_read, image, self._spec.image_size) for image in group]

            groups = iter(own)
            coming = deque(map(read, islice(groups, _SHARDS_AHEAD)))
            while coming:
                found = [future.result() for future in coming.popleft()]
                bad = [str(result) for result in found if isinstance(result, UserError)]
                pictures = [result for result in found if isinstance(result, _Picture)]
                faults += bad
                grids = None if bad else self._grids(pictures, encoders, bar)
                coming.extend(map(read, islice(groups, 1)))  # processors have work while the shard is written
                if grids is not None:
                    shards.append(self._write_shard(pictures, grids))
        gathered = self._processes.gather((shards, faults))
        return [shard for part, _ in gathered for shard in part], [fault for _, part in gathered for fault in part]

    def _grids(self, pictures: Sequence[_Picture], encoders: ThreadPoolExecutor, bar: "tqdm[NoReturn]") -> Grids:
        squares = np.concatenate([picture.pixels for picture in pictures])
        grids = np.empty((len(squares), *self._spec.grid_shape), dtype=np.float16)

        def encode_from(start: int) -> int:
            batch = squares[start : start + IMAGES_PER_BATCH]
            grids[start : start + len(batch)] = encode_batch(self._network, batch)
            return len(batch)

        for count in encoders.map(encode_from, range(0, len(squares), IMAGES_PER_BATCH)):
            bar.update(count)
        return grids

    def _write_shard(self, pictures: Sequence[_Picture], grids: Grids) -> Shard:
        image_ids = [picture.image.image_id for picture in pictures for _ in picture.image.views]
        keys = [(picture.image.content, view) for picture in pictures for view in picture.image.views]
        return write_shard(self._folder, self._spec, image_ids, keys, grids)

    def _publish(self, shards: Sequence[Shard], contents: Mapping[int, str], out: Path) -> None:
        staged = self._folder / "published"
        shutil.rmtree(staged, ignore_errors=True)
        for shard in shards:
            publish(shard.path, staged / shard.path.name)
        write_index(staged, self._spec, self._views, shards, contents)
        publish(staged, out)

    def _record(self, counts: Counts, seconds: float) -> None:
        line = {
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": self._spec.fingerprint,
            **asdict(counts),
            "seconds": round(seconds, 1),
            "processes": self._processes.world_size,
        }
        with (self._folder.parent / RUNS_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")


@contextmanager
def _side_by_side(lanes: int) -> Iterator[ThreadPoolExecutor]:
    """At most `lanes` threads, among which this one's processors are shared out."""
    processors = torch.get_num_threads()
    lanes = min(lanes, processors)
    try:
        with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(-(-processors // lanes),)) as pool:
            yield pool
    finally:
        torch.set_num_threads(processors)  # new threads get the number that was set last, by whichever


def _read(image: _Image, size: int) -> _Picture | UserError:
    try:
        file = read_bytes(image.path)
        if sha256(file).hexdigest() != image.content:
            return UserError(f"{image.path}: has changed since the run began; run again")
        return _Picture(image=image, pixels=read_views(file, size, image.views, str(image.path)))
    except UserError as error:
        return error


def _told(faults: Sequence[str], counts: Counts) -> str:
    more = [f"and {len(faults) - _FAULTS_TOLD} more"] if len(faults) > _FAULTS_TOLD else []
    return (
        "; ".join([*faults[:_FAULTS_TOLD], *more]) + f" (nothing is published; what could be encoded is kept: {counts})"
    )
