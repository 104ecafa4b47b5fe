"""Opening the HDF5 artefacts of one stage, whose schema must be the one that this version reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from pipeline.errors import UserError


@contextmanager
def open_artefact(path: Path, schema: str, version: int, stage: str) -> Iterator[h5py.File]:
    """Open a file of `schema` that `stage` wrote, for reading.

    Raises `UserError`, naming the file and the stage to run, where it is missing, no HDF5 file, of another schema or
    version, or lacks what the block reads from it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `dvc repro {stage}`")
    try:
        with h5py.File(path, "r") as file:
            found = (file.attrs.get("schema"), file.attrs.get("schema_version"))
            if found != (schema, version):
                raise UserError(f"{path}: has schema {found[0]} {found[1]}, this version reads {schema} {version}")
            yield file
    except (OSError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as {schema} ({error}); run `dvc repro -f -s {stage}`") from error
