"""The feature store: a folder of immutable HDF5 shards and an index.

Only this module reads and writes the files. docs/features.md documents their format for other programs.

Shapes: B images, N rows of a shard, P = H * W regions of a grid in row-major order, C channels.
"""

import logging
import os
import sys
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.artifacts import (
    Int64,
    Schema,
    Sha256,
    file_digest,
    file_digests,
    fingerprint,
    publish,
    read_document_in_parts,
    write_atomically,
    write_document,
)
from pipeline.errors import UserError, summarize
from pipeline.features.resnets import MAX_CHANNELS, STRIDES, Architecture, Layer, encoder_frame
from pipeline.features.views import Frame, Resize, View
from pipeline.hdf5 import checked_dataset, open_artifact, read_dataset

logger = logging.getLogger("gridcap")

# Raise the version when the format changes, and when the same image file would get another grid: it is part of the
# fingerprint, so no old row is reused.
SCHEMA = Schema("gridcap.features", 5)
INDEX_FILE = "index.json"

Grids = npt.NDArray[np.float16]
RowKey = tuple[str, str]
"""Key of a row: the SHA-256 of an image file, in hexadecimal, and the name of a view."""

_REMEDY = "Run `dvc repro -f -s encode`."

_PROCESS_STATE = frozenset({"_pid", "_lock", "_descriptors", "_offsets"})
"""Attributes of an open store that no other process may use."""

_KEY_DTYPES = {"sha256": "S64", "view": "S24"}
"""Dtypes of the datasets of a shard that hold the keys of its rows."""

# All shards of COCO, with 128 rows each, would nearly reach the usual limit of 1,024 open files per process.
_MAX_OPEN_SHARDS = 512


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Encoder and input size, which determine the grid of an image. All rows of a store have the same spec."""

    architecture: Architecture
    """Name of the ResNet in torchvision, or of CLIP's (`RN...`)."""
    layer: Layer
    """Last layer of the encoder."""
    weights_digest: Sha256
    """SHA-256 of the encoder's weights, in hexadecimal."""
    image_height: Annotated[int, Field(ge=8, le=2048)]
    """Height of the encoder's input, in px."""
    image_width: Annotated[int, Field(ge=8, le=2048)]
    """Width of the encoder's input, in px."""
    resize: Resize
    """How views are fitted to the encoder's input."""
    precision: Literal["float32", "bfloat16", "int8"]
    """Arithmetic of the encoder."""
    compiled: bool
    """Whether the encoder was compiled, which changes rounding."""
    grid_height: Annotated[int, Field(ge=1, le=256)]
    """Rows of the grid, after pooling; region `r` is in row `r // grid_width`."""
    grid_width: Annotated[int, Field(ge=1, le=256)]
    """Columns of the grid, after pooling."""
    channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
    """Features per region."""

    @property
    def fingerprint(self) -> str:
        """Identifier of the spec and the schema version: 16 hexadecimal digits."""
        return fingerprint(schema_version=SCHEMA.version, **asdict(self))

    @property
    def frame(self) -> Frame:
        """Input of the encoder."""
        return encoder_frame(self.architecture, self.image_height, self.image_width, self.resize)

    @property
    def unpooled_grid(self) -> tuple[int, int]:
        """Height and width of the grid before pooling, in regions."""
        stride = STRIDES[self.layer]
        return self.image_height // stride, self.image_width // stride

    @property
    def pool(self) -> tuple[int, int] | None:
        """Height and width that grids are reduced to by adaptive average pooling, or None."""
        return None if self.grid == self.unpooled_grid else self.grid

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid, in regions."""
        return self.grid_height, self.grid_width

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Shape of a grid, (P, C)."""
        return self.grid_height * self.grid_width, self.channels

    @property
    def grid_bytes(self) -> int:
        """Size of a grid, in bytes."""
        return self.grid_height * self.grid_width * self.channels * np.dtype(np.float16).itemsize


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A complete shard in the work folder."""

    path: Path
    sha256: str
    """SHA-256 of the file."""
    key_lines: str
    """Key of each row, as lines `SHA256 VIEW`. For COCO, tuples of all shards would take 30 MB."""
    undecodable: tuple[str, ...] = ()
    """SHA-256 of the image files that were planned for the shard but cannot be decoded. The published shard lacks it.
    """

    @property
    def keys(self) -> list[RowKey]:
        """Key of each row."""
        lines = (line.partition(" ") for line in self.key_lines.splitlines())
        return [(digest, sys.intern(view)) for digest, _, view in lines]


@dataclass(frozen=True, kw_only=True)
class _ShardEntry:
    file: Annotated[str, Field(pattern=r"^shard-[0-9a-f]{16}\.h5$")]
    sha256: Sha256
    rows: Annotated[int, Field(ge=1, lt=2**31)]


@dataclass(frozen=True, kw_only=True)
class _Index:
    fingerprint: str
    spec: EncoderSpec
    views: Annotated[tuple[View, ...], Field(min_length=1)]
    shards: tuple[_ShardEntry, ...]
    images: dict[Int64, tuple[tuple[int, int], ...]]
    """Image id to (shard, row) of each view."""
    skipped: tuple[Int64, ...] = ()
    """Ids of the images that were skipped, since their files cannot be decoded, ascending."""

    def __post_init__(self) -> None:
        """Check that the parts of the index belong together."""
        if self.fingerprint != self.spec.fingerprint:
            raise ValueError(f"fingerprint is {self.fingerprint}, but that of the spec is {self.spec.fingerprint}")
        num_rows = [shard.rows for shard in self.shards]
        for image_id, locations in self.images.items():
            if len(locations) != len(self.views):
                raise ValueError(f"image {image_id} has {len(locations)} rows, but there are {len(self.views)} views")
            for shard, row in locations:
                if not (0 <= shard < len(num_rows) and 0 <= row < num_rows[shard]):
                    raise ValueError(f"image {image_id} has row {row} of shard {shard}, which does not exist")


def write_shard(
    folder: Path,
    spec: EncoderSpec,
    image_ids: Sequence[int],
    keys: Sequence[RowKey],
    grids: Grids,
    undecodable: Sequence[str] = (),
) -> Shard:
    """Write a shard atomically, then its digest. `intact_shards` discards shards without a digest.

    Name and bytes of the file depend only on the arguments.

    Args:
        folder: Folder of the file.
        spec: Spec of the encoder that made the grids.
        image_ids: Image id of each row at the time of encoding.
        keys: Key of each row.
        grids: float16 [N, P, C].
        undecodable: As in the result. It is written next to the digest.
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
                np.array([digest for digest, _ in keys], dtype=_KEY_DTYPES["sha256"]),
                "SHA-256 of the image file, in hexadecimal",
            ),
            "view": (
                np.array([view for _, view in keys], dtype=_KEY_DTYPES["view"]),
                "view of the image: whole or a crop, mirrored if flipped",
            ),
        }
        for name, (values, description) in columns.items():
            file.create_dataset(name, data=values).attrs["description"] = description
        file.flush()
        content = file.id.get_file_image()
    shard = Shard(
        path=folder / shard_name(keys),
        sha256=sha256(content).hexdigest(),
        key_lines=_key_lines(keys),
        undecodable=tuple(undecodable),
    )
    write_atomically(shard.path, content)
    write_atomically(_digest_path(shard.path), "".join(f"{line}\n" for line in (shard.sha256, *shard.undecodable)))
    return shard


def shard_name(keys: Sequence[RowKey]) -> str:
    """Return the file name of the shard with these rows."""
    return f"shard-{sha256(_key_lines(keys).encode()).hexdigest()[:16]}.h5"


def _key_lines(keys: Sequence[RowKey]) -> str:
    return "\n".join(f"{digest} {view}" for digest, view in keys)


def adopt_shard(source: Path, path: Path, expected_digest: str, keys: Sequence[RowKey]) -> Shard | None:
    """Link a shard of another store into a work folder, or copy it, then write its digest.

    Args:
        source: The shard.
        path: Its path in the work folder.
        expected_digest: Its SHA-256, in hexadecimal.
        keys: Key of each of its rows.

    Returns:
        The shard in the work folder, or None if the bytes of `source` do not match the digest.
    """
    publish(source, path)
    if file_digest(path) != expected_digest:
        path.unlink()
        return None
    write_atomically(_digest_path(path), expected_digest + "\n")
    return Shard(path=path, sha256=expected_digest, key_lines=_key_lines(keys))


def intact_shards(folder: Path, spec: EncoderSpec) -> list[Shard]:
    """List the shards of a work folder whose bytes match their digests, and delete all other shards.

    Args:
        folder: Work folder of one spec.
        spec: The spec.
    """
    for partial in folder.glob(".shard-*.partial"):
        partial.unlink()
    paths = sorted(folder.glob("shard-*.h5"))
    shards = []
    for path, digest in zip(paths, file_digests(paths, str(folder), "shard"), strict=True):
        if isinstance(digest, OSError):
            raise digest
        recorded = _recorded_digests(path)
        keys = read_keys(path, spec) if recorded[:1] == [digest] else None
        if keys is None:
            logger.warning("%s: unfinished or damaged. Its images are encoded again.", path)
            path.unlink()
            continue
        shards.append(Shard(path=path, sha256=digest, key_lines=_key_lines(keys), undecodable=tuple(recorded[1:])))
    return shards


def _recorded_digests(path: Path) -> list[str]:
    """Read the digest file of a shard: the digest of the shard, then those of images that cannot be decoded."""
    file = _digest_path(path)
    return file.read_text(errors="replace").splitlines() if file.is_file() else []


def read_keys(path: Path, spec: EncoderSpec) -> tuple[RowKey, ...] | None:
    """Read the keys of a shard's rows; None if it is not a shard of the spec."""
    try:
        with _open_shard(path, spec) as file:
            digests, views = (read_dataset(file, name, dtype, [None]) for name, dtype in _KEY_DTYPES.items())
            checked_dataset(file, "grid", "<f2", [len(digests), *spec.grid_shape])
            return tuple(zip(digests.astype(str).tolist(), views.astype(str).tolist(), strict=True))
    except UserError:
        return None


@contextmanager
def _open_shard(path: Path, spec: EncoderSpec) -> Iterator[h5py.File]:
    """Open a shard, and check its schema and its spec."""
    with open_artifact(path, SCHEMA, _REMEDY) as file:
        actual = file.attrs["fingerprint"]
        if actual != spec.fingerprint:
            raise UserError(f"{path}: has encoder fingerprint {actual}, expected {spec.fingerprint}. {_REMEDY}")
        yield file


def write_index(
    folder: Path,
    spec: EncoderSpec,
    views: Sequence[View],
    shards: Sequence[Shard],
    image_digests: Mapping[int, str],
    skipped: Sequence[int] = (),
) -> None:
    """Write the index, which turns a folder of shards into a store.

    Args:
        folder: Folder of the shards.
        spec: Spec of the encoder that made the grids.
        views: Views of every image, in the order of the index.
        shards: The shards, which must have a row for every image and view.
        image_digests: Image id to the SHA-256 of its file; may have skipped images.
        skipped: Ids of the images that were skipped, since their files cannot be decoded.
    """
    skipped_ids = frozenset(skipped)
    # The strings of `image_digests` and the pairs of `locations` are shared: for COCO, copies would take 80 MB.
    digests = {digest: digest for digest in image_digests.values()}
    locations: dict[str, dict[str, tuple[int, int]]] = {view: {} for view in views}
    entries = []
    for number, shard in enumerate(shards):
        keys = shard.keys
        entries.append({"file": shard.path.name, "sha256": shard.sha256, "rows": len(keys)})
        for row, (digest, view) in enumerate(keys):
            if digest in digests and view in locations:
                locations[view][digests[digest]] = (number, row)
    index = {
        "fingerprint": spec.fingerprint,
        "spec": asdict(spec),
        "views": views,
        "shards": entries,
        "images": {
            str(image_id): [locations[view][image_digests[image_id]] for view in views]
            for image_id in sorted(image_digests)
            if image_id not in skipped_ids
        },
        "skipped": sorted(skipped),
    }
    write_document(folder / INDEX_FILE, SCHEMA, index, indent=None)


def shard_digests(index: Path, fingerprint: str) -> dict[str, str]:
    """Read the SHA-256, in hexadecimal, of each shard of a store from its index, by file name.

    Args:
        index: The index file.
        fingerprint: Fingerprint of the stores of interest; another store has no shards of interest.

    Raises:
        UserError: The file is missing, damaged or of another schema version.
    """
    contents, _, _ = _read_index(index)
    return {shard.file: shard.sha256 for shard in contents.shards} if contents.fingerprint == fingerprint else {}


def _read_index(path: Path) -> tuple[_Index, npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Read an index.

    The Python objects of all images would take 100 MB for COCO.

    Returns:
        The index, which lacks images; the image ids, ascending [N]; shard and row of each of their views [N, V, 2].
    """
    ids, rows = [], []
    for index in read_document_in_parts(path, _Index, _REMEDY, SCHEMA, "images"):
        ids.append(np.array([*index.images], dtype=np.int64))
        rows.append(np.array([*index.images.values()], dtype=np.int32).reshape(-1, len(index.views), 2))
    image_ids = np.concatenate(ids)
    order = image_ids.argsort()
    return index, image_ids[order], np.concatenate(rows)[order]


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
        index, self._image_ids, self._rows = _read_index(self._folder / INDEX_FILE)
        self.spec = index.spec
        """Spec of the encoder that made the grids."""
        self.fingerprint = index.fingerprint
        """Identifier of the spec and the schema version."""
        self.views = index.views
        """Views of every image; captions are generated from the first."""
        self.skipped_ids = frozenset(index.skipped)
        """Ids of the images that `encode` skipped, since their files cannot be decoded."""
        self._shards = index.shards
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
        self._verify(self._shards)
        return len(self._shards)

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
        return tuple(self._image_ids.tolist())

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
        ids = list(image_ids)
        view_indices = [0] * len(ids) if views is None else list(views)
        positions = [self._find(image_id) for image_id in ids]
        rows = self._rows[positions, view_indices].tolist()  # shard and row of each image
        if os.getpid() != self._pid:
            self._reset_after_fork()
        grids = np.empty((len(rows), *self.grid_shape), dtype=np.float16)
        with self._lock:
            if len(rows) > 1:
                self._prefetch(rows)
            for grid, (shard, row) in zip(grids, rows, strict=True):
                self._read_row(shard, row, grid)
        return grids

    def shard_path(self, image_id: int) -> Path:
        """Return the file with the grid of an image's first view.

        Raises:
            UserError: The index lacks the image.
        """
        return self._path(self.first_row(image_id)[0])

    def image_digest(self, image_id: int) -> str:
        """Read the SHA-256, in hexadecimal, of the image file that was encoded.

        Raises:
            UserError: As `grids`.
        """
        shard, row = self.first_row(image_id)
        num_rows = self._shards[shard].rows
        with _open_shard(self._path(shard), self.spec) as file:
            return str(checked_dataset(file, "sha256", _KEY_DTYPES["sha256"], [num_rows]).asstr()[row])

    def first_row(self, image_id: int) -> tuple[int, int]:
        """Return shard and row of an image's first view. Only images whose files have the same bytes share a row.

        Raises:
            UserError: The index lacks the image.
        """
        shard, row = self._rows[self._find(image_id), 0].tolist()
        return shard, row

    def _find(self, image_id: int) -> int:
        """Return the index of an image in `image_ids`."""
        position = bisect_left(self._image_ids, image_id)
        if position < len(self._image_ids) and self._image_ids[position] == image_id:
            return position
        fault = (
            f"image {image_id} was skipped, since its file cannot be decoded. Replace the file, then run"
            if image_id in self.skipped_ids
            else f"has no image {image_id}. Run"
        )
        raise UserError(f"{self._folder / INDEX_FILE}: {fault} `dvc repro encode`.")

    def _read_row(self, shard: int, row: int, out: Grids) -> None:
        """Read one row into `out`, float16 [P, C]."""
        descriptor, offset = self._descriptor(shard), self._offset(shard) + row * out.nbytes
        try:
            num_read = os.preadv(descriptor, [out.data], offset)
        except OSError as error:
            raise self._cannot_be_read(shard, error) from error
        if num_read < out.nbytes:
            raise UserError(f"{self._path(shard)}: truncated at row {row}. {_REMEDY}")

    def _prefetch(self, rows: Iterable[tuple[int, int]]) -> None:
        """Let the system start to read rows, each given by shard and row: a disk reads many at once faster."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        size = self.spec.grid_bytes
        for shard, row in rows:
            descriptor, offset = self._descriptor(shard), self._offset(shard) + row * size
            with suppress(OSError):  # a file system without it
                os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def _offset(self, shard: int) -> int:
        """Return the byte offset of row 0 of a shard, which is verified first if reads are."""
        if shard not in self._offsets:
            if self._verify_reads:
                self._verify([self._shards[shard]], silent=True)
            self._offsets[shard] = self._find_rows(shard)
        return self._offsets[shard]

    def _descriptor(self, shard: int) -> int:
        """Return the descriptor of an open shard; open it if necessary."""
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
        else:
            try:
                self._descriptors[shard] = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise self._cannot_be_read(shard, error) from error
            if len(self._descriptors) > _MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
        return self._descriptors[shard]

    def _cannot_be_read(self, shard: int, error: OSError) -> UserError:
        return UserError(f"{self._path(shard)}: cannot be read ({error.strerror}). {_REMEDY}")

    def _path(self, shard: int) -> Path:
        return self._folder / self._shards[shard].file

    def _find_rows(self, shard: int) -> int:
        """Check a shard and return the byte offset of row 0. HDF5 takes longer to locate a row than to read it."""
        path, num_rows = self._path(shard), self._shards[shard].rows
        with _open_shard(path, self.spec) as file:
            grid = checked_dataset(file, "grid", "<f2", [num_rows, *self.grid_shape])
            offset = grid.id.get_offset()
            if offset is None or offset + grid.nbytes > path.stat().st_size:
                raise ValueError("dataset grid is not contiguous, or truncated")
            return int(offset)

    def _init_process_state(self) -> None:
        """Set the attributes in `_PROCESS_STATE`."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._offsets: dict[int, int] = {}

    def _reset_after_fork(self) -> None:
        """Close inherited files and replace the lock, which another thread may have held during the fork."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._init_process_state()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _PROCESS_STATE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_process_state()


def _digest_path(shard: Path) -> Path:
    return shard.with_suffix(".sha256")
