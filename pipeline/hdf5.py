"""The reader of HDF5 artifacts. It checks schema and version, and converts the errors of h5py to `UserError`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from pipeline.artifacts import Schema
from pipeline.errors import UserError


@contextmanager
def open_artifact(path: Path, schema: Schema | None, remedy: str) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, without a file lock.

    Args:
        path: The file.
        schema: Schema that the attributes `schema` and `schema_version` of the file must record; None accepts any
            HDF5 file.
        remedy: What the user should do about a missing or damaged file, as a sentence.

    Raises:
        UserError: The file is missing, not HDF5, of another schema, or lacks data that the `with` block reads.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. {remedy}")
    try:
        with h5py.File(path, "r", locking=False) as file:
            if schema is not None:
                schema.check(path, (file.attrs.get("schema"), file.attrs.get("schema_version")), remedy)
            yield file
    # h5py detects damage only when the data is read, and raises any of these.
    except (OSError, LookupError, RuntimeError, ValueError, TypeError) as error:
        name = "HDF5" if schema is None else schema.name
        raise UserError(f"{path}: cannot be read as {name} ({error}). {remedy}") from error
