"""The feature store: a folder of immutable HDF5 shards and an index.

Only this module reads and writes the files. docs/features.md documents their format for other programs.

Shapes: B images, N rows of a shard, P = H * W regions of a grid in row-major order, C channels.
"""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter

from pipeline.artifacts import Schema, file_digests, fingerprint, read_json, write_atomically
from pipeline.errors import UserError, summarize
from pipeline.features.resnets import Architecture, Layer
from pipeline.hdf5 import open_artifact

logger = logging.getLogger("gridcap")

# Raise the version when the format changes, and when the same image file would get another grid: it is part of the
# fingerprint, so no old row is reused.
SCHEMA = Schema("gridcap.features", 3)
INDEX_FILE = "index.json"

Grids = npt.NDArray[np.float16]
RowKey = tuple[str, str]
"""Key of a row: the SHA-256 of an image file, in hexadecimal, and the name of a view."""

_REMEDY = "Run `dvc repro -f -s encode`."

# All shards of COCO, with 128 rows each, would nearly reach the usual limit of 1,024 open files per process.
_MAX_OPEN_SHARDS = 512


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Encoder and input size, which determine the grid of an image. All rows of a store have the same spec."""

    architecture: Architecture
    """Name of the ResNet in torchvision."""
    layer: Layer
    """Last layer of the encoder."""
    weights_digest: str
    """SHA-256 of the encoder's weights, in hexadecimal."""
    image_size: Annotated[int, Field(ge=8, le=2048)]
    """Side of the square that images are resized to, in px."""
    precision: Literal["float32", "bfloat16", "int8"]
    """Arithmetic of the encoder."""
    compiled: bool
    """Whether the encoder was compiled, which changes rounding."""
    grid_height: Annotated[int, Field(ge=1, le=256)]
    """Rows of the grid; region `r` is in row `r // grid_width`."""
    grid_width: Annotated[int, Field(ge=1, le=256)]
    """Columns of the grid."""
    channels: Annotated[int, Field(ge=1, le=2048)]
    """Features per region."""

    @property
    def fingerprint(self) -> str:
        """Identifier of the spec and the schema version: 16 hexadecimal digits."""
        return fingerprint(schema_version=SCHEMA.version, **asdict(self))

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid, in regions."""
        return self.grid_height, self.grid_width

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Shape of a grid, (P, C)."""
        return self.grid_height * self.grid_width, self.channels


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A complete shard in the work folder."""

    path: Path
    sha256: str
    """SHA-256 of the file."""
    keys: tuple[RowKey, ...]
    """Key of each row."""


@dataclass(frozen=True, kw_only=True)
class _ShardEntry:
    file: str
    sha256: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class _Index:
    schema: str
    schema_version: int
    fingerprint: str
    spec: EncoderSpec
    views: tuple[str, ...]
    shards: tuple[_ShardEntry, ...]
    images: dict[int, tuple[tuple[int, int], ...]]
    """Image id to (shard, row) of each view."""


@dataclass(frozen=True, kw_only=True)
class _OpenShard:
    """An open shard and the offset of its rows. HDF5 takes longer to locate a row than to read it."""

    descriptor: int
    offset: int
    """Byte offset of row 0; the rows are contiguous."""


def write_shard(
    folder: Path, spec: EncoderSpec, image_ids: Sequence[int], keys: Sequence[RowKey], grids: Grids
) -> Shard:
    """Write a shard atomically, then its digest. `intact_shards` discards shards without a digest.

    Name and bytes of the file depend only on the arguments.

    Args:
        folder: Folder of the file.
        spec: Spec of the encoder that made the grids.
        image_ids: Image id of each row at the time of encoding.
        keys: Key of each row.
        grids: float16 [N, P, C].
    """
    # Built in memory: after a write to a full disk fails, HDF5 cannot even close the file.
    with h5py.File("shard.h5", "w", driver="core", backing_store=False) as file:
        file.attrs.update(
            {
                **SCHEMA.header,
                "fingerprint": spec.fingerprint,
                **asdict(spec),
            }
        )
        columns = {
            "grid": (
                np.asarray(grids, dtype="<f2"),
                "grid of one view of an image: [row, region, channel]; region r is in row r // grid_width and column"
                " r % grid_width of the view",
            ),
            "image_id": (
                np.asarray(image_ids, dtype="<i8"),
                f"image id at the time of encoding; {INDEX_FILE} maps current image ids to rows",
            ),
            "sha256": (
                np.array([digest for digest, _ in keys], dtype="S64"),
                "SHA-256 of the image file, in hexadecimal",
            ),
            "view": (
                np.array([view for _, view in keys], dtype="S24"),
                "view of the image: whole or a crop, mirrored if flipped",
            ),
        }
        for name, (values, description) in columns.items():
            file.create_dataset(name, data=values).attrs["description"] = description
        file.flush()
        content = file.id.get_file_image()
    name = sha256("\n".join(f"{digest} {view}" for digest, view in keys).encode()).hexdigest()[:16]
    shard = Shard(path=folder / f"shard-{name}.h5", sha256=sha256(content).hexdigest(), keys=tuple(keys))
    write_atomically(shard.path, content)
    write_atomically(_digest_path(shard.path), shard.sha256 + "\n")
    return shard


def intact_shards(folder: Path) -> list[Shard]:
    """List the shards of a work folder whose bytes match their digests, and delete all other shards.

    All shards of the folder must have the same spec.
    """
    for partial in folder.glob(".shard-*.partial"):
        partial.unlink()
    paths = sorted(folder.glob("shard-*.h5"))
    shards = []
    for path, digest in zip(paths, file_digests(paths, str(folder), "shard"), strict=True):
        if isinstance(digest, OSError):
            raise digest
        if not _digest_path(path).is_file() or _digest_path(path).read_text() != digest + "\n":
            logger.warning("%s: unfinished or damaged. Its images are encoded again.", path)
            path.unlink()
            continue
        with open_artifact(path, SCHEMA, "Delete the file.") as file:
            digests, views = (file[name].asstr()[:].tolist() for name in ("sha256", "view"))
        shards.append(Shard(path=path, sha256=digest, keys=tuple(zip(digests, views, strict=True))))
    return shards


def write_index(
    folder: Path, spec: EncoderSpec, views: Sequence[str], shards: Sequence[Shard], image_digests: Mapping[int, str]
) -> None:
    """Write the index, which turns a folder of shards into a store.

    Args:
        folder: Folder of the shards.
        spec: Spec of the encoder that made the grids.
        views: Views of every image, in the order of the index.
        shards: The shards, which must have a row for every image and view.
        image_digests: Image id to the SHA-256 of its file.
    """
    locations = {key: (shard, row) for shard, entry in enumerate(shards) for row, key in enumerate(entry.keys)}
    index = _Index(
        schema=SCHEMA.name,
        schema_version=SCHEMA.version,
        fingerprint=spec.fingerprint,
        spec=spec,
        views=tuple(views),
        shards=tuple(_ShardEntry(file=shard.path.name, sha256=shard.sha256, rows=len(shard.keys)) for shard in shards),
        images={
            image_id: tuple(locations[digest, view] for view in views)
            for image_id, digest in sorted(image_digests.items())
        },
    )
    write_atomically(folder / INDEX_FILE, TypeAdapter(_Index).dump_json(index) + b"\n")


class FeatureStore:
    """Grids of a published store, by image id.

    A store can be pickled, inherited across fork and used from several threads: each process opens the shards itself.
    """

    def __init__(self, folder: Path | str, fingerprint: str | None = None, verify_reads: bool = False) -> None:
        """Read the index.

        Args:
            folder: Folder of the store.
            fingerprint: Expected fingerprint of the store; None accepts any.
            verify_reads: Compare a shard with its SHA-256 in the index before its first row is read.

        Raises:
            UserError: The index is missing, damaged, of another schema version, or has another fingerprint.
        """
        self._folder = Path(folder)
        self._index = read_json(self._folder / INDEX_FILE, _Index, _REMEDY, SCHEMA)
        if fingerprint not in (None, self.fingerprint):
            raise UserError(
                f"{self._folder / INDEX_FILE}: has features of encoder fingerprint {self.fingerprint}, expected"
                f" {fingerprint}. Restore section encode of params.yaml and run `dvc repro encode`, or train again."
            )
        self._verify_reads = verify_reads
        self._init_process_state()

    def verify(self) -> int:
        """Compare every shard with its SHA-256 in the index.

        Returns:
            The number of shards.

        Raises:
            UserError: A shard is missing or altered; the message lists the first few.
        """
        self._verify(self._index.shards)
        return len(self._index.shards)

    def _verify(self, shards: Sequence[_ShardEntry], silent: bool = False) -> None:
        paths = [self._folder / shard.file for shard in shards]
        digests = file_digests(paths, str(self._folder), "shard", silent=silent)
        faults = []
        for shard, path, digest in zip(shards, paths, digests, strict=True):
            if isinstance(digest, OSError):
                faults.append(f"{path}: cannot be read ({digest.strerror})")
            elif digest != shard.sha256:
                faults.append(f"{path}: SHA-256 differs from {INDEX_FILE}")
        if faults:
            raise UserError(f"{summarize(faults)}. Run `dvc repro -f -s encode` to encode only their images again.")

    @property
    def spec(self) -> EncoderSpec:
        """Spec of the encoder that made the grids."""
        return self._index.spec

    @property
    def fingerprint(self) -> str:
        """Identifier of the spec and the schema version."""
        return self._index.fingerprint

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Shape of a grid, (P, C)."""
        return self.spec.grid_shape

    @property
    def channels(self) -> int:
        """Features per region, C."""
        return self.spec.channels

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Ids of all images, ascending."""
        return tuple(self._index.images)

    @property
    def views(self) -> tuple[str, ...]:
        """Views of every image; captions are generated from the first."""
        return self._index.views

    def grid(self, image_id: int) -> Grids:
        """Read the grid of an image's first view: float16 [P, C].

        Raises:
            UserError: As `grids`.
        """
        grid: Grids = self.grids([image_id])[0]
        return grid

    def grids(self, image_ids: Iterable[int], views: Iterable[int] | None = None) -> Grids:
        """Read the grids of a batch of images.

        Args:
            image_ids: The images; an id may occur more than once.
            views: Index into `self.views` for each image; None reads the first view of every image.

        Returns:
            float16 [B, P, C], in the order of `image_ids`.

        Raises:
            UserError: The index lacks an image, or a shard is missing, damaged or, if reads are verified, altered.
        """
        locations = [self._locations(image_id) for image_id in image_ids]
        view_indices = [0] * len(locations) if views is None else list(views)
        rows = [location[view] for location, view in zip(locations, view_indices, strict=True)]
        if os.getpid() != self._pid:
            self._reset_after_fork()
        grids = np.empty((len(rows), *self.grid_shape), dtype=np.float16)
        with self._lock:
            for grid, (shard, row) in zip(grids, rows, strict=True):
                self._read_row(shard, row, grid)
        return grids

    def image_digest(self, image_id: int) -> str:
        """Read the SHA-256, in hexadecimal, of the image file that was encoded.

        Raises:
            UserError: As `grids`.
        """
        shard, row = self._locations(image_id)[0]
        with open_artifact(self._path(shard), SCHEMA, _REMEDY) as file:
            return str(file["sha256"].asstr()[row])

    def _locations(self, image_id: int) -> tuple[tuple[int, int], ...]:
        """Return (shard, row) of each view of an image."""
        try:
            return self._index.images[image_id]
        except KeyError:
            raise UserError(f"{self._folder / INDEX_FILE}: has no image {image_id}. Run `dvc repro encode`.") from None

    def _read_row(self, shard: int, row: int, out: Grids) -> None:
        """Read one row into `out`, float16 [P, C]."""
        if shard in self._open_shards:
            self._open_shards.move_to_end(shard)
        else:
            if self._verify_reads and shard not in self._verified:
                self._verify([self._index.shards[shard]], silent=True)
                self._verified.add(shard)
            self._open_shards[shard] = self._open_shard(self._path(shard))
            if len(self._open_shards) > _MAX_OPEN_SHARDS:
                os.close(self._open_shards.popitem(last=False)[1].descriptor)
        file = self._open_shards[shard]
        try:
            num_read = os.preadv(file.descriptor, [out.data], file.offset + row * out.nbytes)
        except OSError as error:
            raise UserError(f"{self._path(shard)}: cannot be read ({error.strerror}). {_REMEDY}") from error
        if num_read < out.nbytes:
            raise UserError(f"{self._path(shard)}: truncated at row {row}. {_REMEDY}")

    def _path(self, shard: int) -> Path:
        return self._folder / self._index.shards[shard].file

    def _open_shard(self, path: Path) -> _OpenShard:
        with open_artifact(path, SCHEMA, _REMEDY) as file:
            actual = file.attrs["fingerprint"]
            if actual != self.fingerprint:
                raise UserError(f"{path}: has encoder fingerprint {actual}, expected {self.fingerprint}. {_REMEDY}")
            grid = file["grid"]
            offset = grid.id.get_offset()
            if grid.shape[1:] != self.grid_shape or grid.dtype != np.dtype("<f2") or offset is None:
                num_regions, channels = self.grid_shape
                raise ValueError(f"dataset grid is not contiguous float16 [N, {num_regions}, {channels}]")
            return _OpenShard(descriptor=os.open(path, os.O_RDONLY | os.O_CLOEXEC), offset=offset)

    def _init_process_state(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._verified: set[int] = set()

    def _reset_after_fork(self) -> None:
        """Close inherited files and replace the lock, which another thread may have held during the fork."""
        for shard in self._open_shards.values():
            os.close(shard.descriptor)
        self._init_process_state()

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_index": self._index, "_verify_reads": self._verify_reads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_process_state()


def _digest_path(shard: Path) -> Path:
    return shard.with_suffix(".sha256")
