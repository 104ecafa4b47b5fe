"""The reader and the writer of HDF5 artifacts.

The reader checks schema and version, that all data is in the file itself, and dtypes and shapes before it reads. It
converts the errors of h5py to `UserError`. Neither locks files: HDF5 fails on file systems without locks, and artifacts
are immutable once published.
"""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.artifacts import Schema, naming
from pipeline.errors import UserError
from pipeline.startup import defer_interrupts


@contextmanager
def open_artifact(path: Path, schema: Schema | None, remedy: str) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, without a file lock.

    Args:
        path: The file.
        schema: Schema that the attributes `schema` and `schema_version` of the file must record; None accepts any
            HDF5 file.
        remedy: What the user should do about a missing or damaged file, as a sentence.

    Raises:
        UserError: The file is missing, not HDF5, of another schema, refers to other files, or lacks data that the
            `with` block reads.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. {remedy}")
    try:
        with h5py.File(path, "r", locking=False) as file:
            if schema is not None:
                schema.check(path, (file.attrs.get("schema"), file.attrs.get("schema_version")), remedy)
            _require_self_contained(file)
            yield file
    # h5py detects damage only when the data is read, and raises any of these.
    except (OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError, MemoryError) as error:
        name = "HDF5" if schema is None else schema.name
        raise UserError(f"{path}: cannot be read as {name} ({' '.join(str(error).split())}). {remedy}") from error


def _require_self_contained(file: h5py.File) -> None:
    """Check that a file has no data outside of it, which could be any file of the computer.

    Raises:
        ValueError: The file has an external link, or a dataset with external or virtual storage.
    """
    visited: set[int] = set()
    groups: list[h5py.Group] = [file]
    while groups:
        group = groups.pop()
        for name in group:
            # The methods that visit all objects call Python code, and HDF5 can lose its exceptions.
            link = group.get(name, getclass=True, getlink=True)
            if link is h5py.SoftLink:  # to another name in this file
                continue
            if link is not h5py.HardLink:
                raise ValueError(f"{name} is a link to another file")
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if isinstance(item, h5py.Group) and address not in visited:
                groups.append(item)
            elif isinstance(item, h5py.Dataset):
                properties = item.id.get_create_plist()
                if properties.get_external_count() or properties.get_layout() == h5py.h5d.VIRTUAL:
                    raise ValueError(f"dataset {name} is stored in another file")
            visited.add(address)


def checked_dataset(group: h5py.Group, name: str, dtype: DTypeLike, shape: Sequence[int | None]) -> h5py.Dataset:
    """Return a dataset, after checking its dtype and shape, to read parts of it.

    Args:
        group: Group or file of the dataset.
        name: Name of the dataset.
        dtype: Expected dtype, such as `h5py.string_dtype()`.
        shape: Expected shape; None for an axis of any length.

    Raises:
        ValueError: There is no such dataset, or it has another dtype or shape.
    """
    item = group.get(name)
    if not isinstance(item, h5py.Dataset):
        raise ValueError(f"has no dataset {name}")
    actual = item.shape or ()  # None for an HDF5 dataset without values
    has_shape = len(actual) == len(shape) and all(
        expected in (None, size) for expected, size in zip(shape, actual, strict=True)
    )
    # NumPy considers all dtypes of objects equal.
    has_dtype = item.dtype == dtype and h5py.check_string_dtype(item.dtype) == h5py.check_string_dtype(np.dtype(dtype))
    if not (has_shape and has_dtype):
        axes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"dataset {name} is {item.dtype} {list(actual)}, expected {np.dtype(dtype)} [{axes}]")
    return item


def read_dataset(group: h5py.Group, name: str, dtype: DTypeLike, shape: Sequence[int | None]) -> NDArray[Any]:
    """Read a whole dataset, after checking its dtype and shape, and that the file holds all of its values.

    A small file can declare a dataset of any size, of which the values that it does not hold are read as zeros.

    Args:
        group: As for `checked_dataset`.
        name: As for `checked_dataset`.
        dtype: As for `checked_dataset`.
        shape: As for `checked_dataset`.

    Returns:
        The values; strings of variable length as `str`.

    Raises:
        ValueError: As `checked_dataset`, or the file lacks values.
    """
    item = checked_dataset(group, name, dtype, shape)
    if item.id.get_storage_size() < item.nbytes:
        raise ValueError(f"dataset {name} is not stored completely")
    return np.asarray(item.asstr()[()] if item.dtype.kind == "O" else item[()])


@contextmanager
def create_artifact(path: Path, schema: Schema) -> Iterator[h5py.File]:
    """Create an HDF5 file with the attributes of its schema, without a file lock, and sync it to the disk.

    Write to it inside `defer_interrupts`, since HDF5 can lose an exception that is raised while it calls Python code.

    Args:
        path: The file.
        schema: Schema that the file records.

    Raises:
        OSError: The file cannot be written, for example because the disk is full. The error names the file.
    """
    with naming(path), path.open("w+b", buffering=0) as raw:
        file = _WritableFile(raw)
        with defer_interrupts():
            artifact = h5py.File(file, "w")
            artifact.attrs.update(schema.header)
        try:
            yield artifact
        finally:
            with defer_interrupts():
                artifact.close()
            # Any error of h5py is a consequence of this one.
            if file.error is not None:
                raise file.error
        os.fsync(raw.fileno())


def content_digest(file: h5py.File) -> str:
    """Return the SHA-256, in hexadecimal, of all datasets and attributes of a file, except its attribute `sha256`.

    Names, types, shapes and values count. How the file stores them does not.
    """
    digest = sha256()

    def update(name: str, item: h5py.HLObject) -> None:
        for key, value in sorted(item.attrs.items()):
            if (name, key) != ("/", "sha256"):
                digest.update(f"{name}@{key}: {value!s}\n".encode())
        if isinstance(item, h5py.Dataset):
            digest.update(f"{name}: {item.dtype} {item.shape}\n".encode())
            digest.update(np.ascontiguousarray(item).data)

    update("/", file)
    file.visititems(update)
    return digest.hexdigest()


class _WritableFile(io.RawIOBase):
    """A file for HDF5 that continues in memory after a write fails; `error` is the first error.

    HDF5 cannot close a file that it cannot write, and reads back what it has written: it would crash the process.
    """

    def __init__(self, raw: io.FileIO) -> None:
        self._file: io.FileIO | io.BytesIO = raw
        self.error: OSError | None = None

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)

    def write(self, data: Any) -> int:
        start = self._file.tell()
        remaining = memoryview(data)
        size = remaining.nbytes
        try:
            while remaining.nbytes:
                remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            self._continue_in_memory(error)
            self._file.seek(start)
            self._file.write(data)
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._continue_in_memory(error)
            return self._file.truncate(size)

    def _continue_in_memory(self, error: OSError) -> None:
        self.error = error
        position = self._file.tell()
        self._file.seek(0)
        self._file = io.BytesIO(self._file.read())
        self._file.seek(position)
