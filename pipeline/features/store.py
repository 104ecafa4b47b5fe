"""The feature store: a folder of immutable HDF5 shards and an index. This module alone reads and writes them.

docs/features.md describes the form for those who read the files without this module.

B images, P = H * W regions of a grid, by rows, C channels.
"""

import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import file_digests, fingerprint, write_atomically
from pipeline.errors import UserError

SCHEMA = "gridcap.features"
# Raise it when shards change, and when the way from an image file to a row changes: no old row is used again.
SCHEMA_VERSION = 3
INDEX_FILE = "index.json"

Grids = npt.NDArray[np.float16]
RowKey = tuple[str, str]
"""What a row is found by: the SHA-256 of an image file, in hexadecimal, and the name of a view of it."""

# One handle a shard: all of COCO in shards of 128 would meet the usual limit of 1,024 files a process.
_HANDLES = 512


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The encoder setting that all rows of a store share: stores of one setting agree about every image."""

    architecture: str
    """torchvision's name of the ResNet."""
    layer: str
    """Last layer kept."""
    weights_digest: str
    """SHA-256 over the encoder's tensors, in hexadecimal."""
    image_size: int
    """Side in px of the square that the picture was resized to."""
    precision: Literal["float32", "bfloat16", "int8"]
    """Arithmetic inside the ResNet."""
    compiled: bool
    """Whether the ResNet was compiled, which rounds otherwise."""
    grid_height: int
    """Rows of the grid; region `r` is in row `r // grid_width`."""
    grid_width: int
    """Columns of the grid."""
    channels: int
    """Numbers that describe one region."""

    @property
    def fingerprint(self) -> str:
        """What names the setting, with the schema version, in 16 hexadecimal digits."""
        return fingerprint(schema_version=SCHEMA_VERSION, **asdict(self))

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width in regions."""
        return self.grid_height, self.grid_width

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(P, C)."""
        return self.grid_height * self.grid_width, self.channels


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A whole shard in the work folder."""

    path: Path
    digest: str
    """SHA-256 of the file."""
    keys: tuple[RowKey, ...]
    """What each row describes."""


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


@dataclass(frozen=True, kw_only=True)
class _OpenShard:
    """Where the rows lie in an open file: HDF5 is asked once, since it takes longer to find a row than to read it."""

    descriptor: int
    offset: int
    """Byte at which row 0 begins; the others follow."""


def write_shard(
    folder: Path, spec: EncoderSpec, image_ids: Sequence[int], keys: Sequence[RowKey], grids: Grids
) -> Shard:
    """Write a shard, atomically, and after it its digest, without which `whole_shards` does not trust it.

    Row `i` holds `grids[i]`, float16 [P, C], of the image file and view `keys[i]`, which was image
    `image_ids[i]` when it was encoded. The file's name and bytes depend on these arguments alone.
    """
    # Built in memory, where HDF5 cannot meet a full disk: after a failed write it cannot even close the file.
    with h5py.File("shard.h5", "w", driver="core", backing_store=False) as file:
        file.attrs.update(
            {
                "schema": SCHEMA,
                "schema_version": SCHEMA_VERSION,
                "fingerprint": spec.fingerprint,
                **asdict(spec),
            }
        )
        grid = file.create_dataset("grid", data=grids, dtype="<f2")
        grid.attrs["description"] = (
            "the encoder's grid of an image's view: [row, region, channel]; region r is in row r // grid_width"
            " and column r % grid_width of the view resized to a square"
        )
        image_id = file.create_dataset("image_id", data=np.asarray(image_ids, dtype="<i8"))
        image_id.attrs["description"] = (
            f"the image's id when it was encoded; {INDEX_FILE} says which images the row stands for now"
        )
        content = file.create_dataset("content", data=np.array([content for content, _ in keys], dtype="S64"))
        content.attrs["description"] = "SHA-256 of the image file's bytes, in hexadecimal"
        view = file.create_dataset("view", data=np.array([view for _, view in keys], dtype="S24"))
        view.attrs["description"] = "what the row shows of the upright picture: all or a part of it, mirrored or not"
        file.flush()
        image = file.id.get_file_image()
    name = sha256("\n".join(f"{content} {view}" for content, view in keys).encode()).hexdigest()[:16]
    shard = Shard(path=folder / f"shard-{name}.h5", digest=sha256(image).hexdigest(), keys=tuple(keys))
    write_atomically(shard.path, image)
    write_atomically(_digest_path(shard.path), shard.digest + "\n")
    return shard


def intact_shards(folder: Path) -> list[Shard]:
    """Find the shards of a work folder whose bytes are as they were written, and delete the others.

    The folder must hold shards of one setting.
    """
    for leftover in folder.glob(".shard-*.partial"):
        leftover.unlink()
    paths = sorted(folder.glob("shard-*.h5"))
    shards = []
    for path, digest in zip(paths, file_digests(paths, str(folder), "shard"), strict=True):
        if isinstance(digest, OSError):
            raise digest
        if _digest_path(path).is_file() and _digest_path(path).read_text() == digest + "\n":
            with h5py.File(path, "r", locking=False) as file:
                contents, views = (file[name].asstr()[:].tolist() for name in ("content", "view"))
            shards.append(Shard(path=path, digest=digest, keys=tuple(zip(contents, views, strict=True))))
        else:
            print(f"{path}: is unfinished or damaged; its images are encoded again", file=sys.stderr)
            path.unlink()
    return shards


def write_index(
    folder: Path, spec: EncoderSpec, views: Sequence[str], shards: Sequence[Shard], contents: Mapping[int, str]
) -> None:
    """Write the index that turns a folder with these shards into a store.

    `contents` maps image ids to the SHA-256 of their files; each must have, in one of the shards, a row for each
    of the views.
    """
    rows = {key: (number, row) for number, shard in enumerate(shards) for row, key in enumerate(shard.keys)}
    index = _Index(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        fingerprint=spec.fingerprint,
        spec=spec,
        views=tuple(views),
        shards=tuple(_ShardEntry(file=shard.path.name, sha256=shard.digest, rows=len(shard.keys)) for shard in shards),
        images={
            image_id: tuple(rows[content, view] for view in views) for image_id, content in sorted(contents.items())
        },
    )
    write_atomically(folder / INDEX_FILE, json.dumps(asdict(index), separators=(",", ":")) + "\n")


class FeatureStore:
    """Reads the grids of a published store by image id.

    It may be pickled, inherited across fork and used from many threads: each process opens shards for itself.
    """

    def __init__(self, folder: Path, fingerprint: str | None = None) -> None:
        """Read the index; with `fingerprint`, insist on that encoder setting.

        Raises `UserError`, naming the file, where the index is missing, damaged, of another schema version or
        of another setting.
        """
        self._folder = folder
        self._index = _read_index(folder / INDEX_FILE)
        if fingerprint not in (None, self.fingerprint):
            raise UserError(
                f"{folder / INDEX_FILE}: holds features of encoder setting {self.fingerprint}, but"
                f" {fingerprint} is needed; restore section encode of params.yaml and run `dvc repro encode`,"
                " or train again"
            )
        self._start_process()

    def verify(self) -> int:
        """Read every shard and compare it with the index; returns their number.

        Raises `UserError` that names each shard which is missing or whose bytes are not those that were written.
        """
        shards = self._index.shards
        paths = [self._folder / shard.file for shard in shards]
        faults = []
        for shard, path, digest in zip(shards, paths, file_digests(paths, str(self._folder), "shard"), strict=True):
            if isinstance(digest, OSError):
                faults.append(f"{path}: cannot be read ({digest.strerror})")
            elif digest != shard.sha256:
                faults.append(f"{path}: its bytes are not those that were written")
        if faults:
            raise UserError("; ".join(faults) + "; encode just their images again with `dvc repro -f -s encode`")
        return len(shards)

    @property
    def spec(self) -> EncoderSpec:
        """The encoder setting that made the grids."""
        return self._index.spec

    @property
    def fingerprint(self) -> str:
        """What names the encoder setting."""
        return self._index.fingerprint

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(P, C)."""
        return self.spec.grid_shape

    @property
    def channels(self) -> int:
        """C."""
        return self.spec.channels

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Ids of all images in the store, ascending."""
        return tuple(self._index.images)

    @property
    def views(self) -> tuple[str, ...]:
        """Views that every image has a grid of; the first is the one that captions are generated from."""
        return self._index.views

    def grid(self, image_id: int) -> Grids:
        """Read the grid of one image's first view, float16 [P, C]. Raises `UserError` as `grids` does."""
        grid: Grids = self.grids([image_id])[0]
        return grid

    def grids(self, image_ids: Iterable[int], views: Iterable[int] | None = None) -> Grids:
        """Read the grids of images, in the order given: float16 [B, P, C].

        `views` gives for each image the place of a view in `self.views`; without it, all are of the first.

        Raises `UserError`, naming the file, for an image that the index lacks and for a shard that is missing
        or damaged.
        """
        rows = [self._rows(image_id) for image_id in image_ids]
        places = [own[view] for own, view in zip(rows, repeat(0) if views is None else views, strict=False)]
        if os.getpid() != self._process:
            self._forget_shards()
        grids = np.empty((len(places), *self.grid_shape), dtype=np.float16)
        with self._lock:
            for grid, (shard, row) in zip(grids, places, strict=True):
                self._read(shard, row, grid)
        return grids

    def content(self, image_id: int) -> str:
        """SHA-256, in hexadecimal, of the image file that an image's grids were made of.

        Raises `UserError` as `grids` does.
        """
        shard, row = self._rows(image_id)[0]
        try:
            with h5py.File(self._path(shard), "r", locking=False) as file:
                return str(file["content"].asstr()[row])
        except (OSError, LookupError, ValueError) as error:
            raise self._unreadable(shard, error) from error

    def _rows(self, image_id: int) -> tuple[tuple[int, int], ...]:
        try:
            return self._index.images[image_id]
        except KeyError:
            raise UserError(f"{self._folder / INDEX_FILE}: has no image {image_id}; run `dvc repro encode`") from None

    def _read(self, shard: int, row: int, into: Grids) -> None:
        try:
            if shard in self._open_shards:
                self._open_shards.move_to_end(shard)
            else:
                self._open_shards[shard] = self._open(self._path(shard))
                if len(self._open_shards) > _HANDLES:
                    os.close(self._open_shards.popitem(last=False)[1].descriptor)
            opened = self._open_shards[shard]
            if os.preadv(opened.descriptor, [into.data], opened.offset + row * into.nbytes) < into.nbytes:
                raise ValueError("it ends early")
        except (OSError, LookupError, ValueError) as error:
            raise self._unreadable(shard, error) from error

    def _path(self, shard: int) -> Path:
        return self._folder / self._index.shards[shard].file

    def _unreadable(self, shard: int, error: Exception) -> UserError:
        return UserError(f"{self._path(shard)}: cannot be read ({error}); run `dvc repro -f -s encode`")

    def _open(self, path: Path) -> _OpenShard:
        # Shards never change: a lock would only fail, on file systems that have none.
        with h5py.File(path, "r", locking=False) as file:
            found = file.attrs.get("fingerprint")
            if found != self.fingerprint:
                raise ValueError(f"it is of encoder setting {found}, not {self.fingerprint}")
            grid = file["grid"]
            if grid.shape[1:] != self.grid_shape or grid.dtype != np.dtype("<f2") or grid.id.get_offset() is None:
                raise ValueError("its grids are not laid out as this version writes them")
            return _OpenShard(descriptor=os.open(path, os.O_RDONLY | os.O_CLOEXEC), offset=grid.id.get_offset())

    def _start_process(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()

    def _forget_shards(self) -> None:
        """Begin anew in a process made by fork, whose lock another thread may have held."""
        for shard in self._open_shards.values():
            os.close(shard.descriptor)
        self._start_process()

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_index": self._index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_process()


def _digest_path(shard: Path) -> Path:
    return shard.with_suffix(".sha256")


def _read_index(path: Path) -> _Index:
    try:
        document = json.loads(path.read_bytes())
        found = document["schema"], document["schema_version"]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run `dvc repro encode`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no index of features; run `dvc repro -f -s encode`") from error
    if found != (SCHEMA, SCHEMA_VERSION):
        raise UserError(
            f"{path}: has schema {found[0]} version {found[1]}, this gridcap reads {SCHEMA} version"
            f" {SCHEMA_VERSION}; run `dvc repro -f -s encode`, or use the version that wrote it"
        )
    try:
        return TypeAdapter(_Index).validate_python(document)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"{path}: is damaged ({place}: {fault['msg']}); run `dvc repro -f -s encode`") from error
