import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.artifacts import Schema
from pipeline.errors import UserError
from pipeline.hdf5 import create_artifact, open_artifact, read_dataset
from tests.paths import ROOT

SCHEMA = Schema("gridcap.test", 2)
REMEDY = "Run something."


def write(path: Path, **attributes: object) -> Path:
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        file["values"] = [1, 2, 3]
    return path


def test_an_artifact_of_the_schema_is_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "file.h5", schema="gridcap.test", schema_version=2)
    with open_artifact(path, SCHEMA, REMEDY) as file:
        assert file["values"][:].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("attributes", "facts"),
    [
        ({"schema": "gridcap.other", "schema_version": 2}, ["gridcap.other", "gridcap.test"]),
        ({"schema": "gridcap.test", "schema_version": 1}, ["version 1", "version 2"]),
        ({}, ["schema"]),
    ],
)
def test_another_schema_is_an_error(tmp_path: Path, attributes: dict[str, object], facts: list[str]) -> None:
    path = write(tmp_path / "file.h5", **attributes)
    with pytest.raises(UserError) as caught, open_artifact(path, SCHEMA, REMEDY):
        pass
    assert [fact for fact in [str(path), REMEDY, *facts] if fact not in str(caught.value)] == []


def test_a_missing_damaged_or_incomplete_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    with pytest.raises(UserError, match=r"file\.h5: no such file"), open_artifact(path, SCHEMA, REMEDY):
        pass
    content = write(path, schema="gridcap.test", schema_version=2).read_bytes()
    with pytest.raises(UserError, match=r"file\.h5"), open_artifact(path, SCHEMA, REMEDY) as file:
        file["absent"]
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"file\.h5"), open_artifact(path, SCHEMA, REMEDY):
        pass


def add_external_link(file: h5py.File) -> None:
    file["linked"] = h5py.ExternalLink("/etc/passwd", "/")


def add_soft_link_to_external_link(file: h5py.File) -> None:
    file["soft"] = h5py.SoftLink("/group/linked")
    file.create_group("group")["linked"] = h5py.ExternalLink("/etc/passwd", "/")


def add_external_storage(file: h5py.File) -> None:
    file.create_group("deep").create_dataset("stored", (8,), np.uint8, external=[("/etc/passwd", 0, 8)])


def add_virtual_dataset(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((3,), np.int64)
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "values", (3,))
    file.create_virtual_dataset("virtual", layout)


@pytest.mark.parametrize(
    ("add", "fault"),
    [
        (add_external_link, "linked is a link to another file"),
        (add_soft_link_to_external_link, "linked is a link to another file"),
        (add_external_storage, "dataset stored is stored in another file"),
        (add_virtual_dataset, "virtual is stored in another file"),
    ],
)
def test_a_file_with_data_elsewhere_is_an_error(tmp_path: Path, add: Callable[[h5py.File], None], fault: str) -> None:
    path = write(tmp_path / "file.h5", schema="gridcap.test", schema_version=2)
    with h5py.File(path, "r+") as file:
        add(file)
    for schema in (SCHEMA, None):
        with pytest.raises(UserError, match=fault), open_artifact(path, schema, REMEDY):
            pass


@pytest.mark.parametrize("version", [np.arange(2), h5py.Empty("i"), "2", "zwei"])
def test_a_schema_version_of_another_type_is_an_error(tmp_path: Path, version: object) -> None:
    path = write(tmp_path / "file.h5", schema="gridcap.test", schema_version=version)
    with pytest.raises(UserError, match=r"file\.h5: .* Run something\."), open_artifact(path, SCHEMA, REMEDY):
        pass


def test_datasets_are_read_after_their_dtype_and_shape_were_checked(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file["values"], file["words"] = np.ones((3, 2), np.float32), ["a", "Mädchen"]
        assert read_dataset(file, "values", np.float32, [None, 2]).tolist() == [[1, 1]] * 3
        assert read_dataset(file, "words", h5py.string_dtype(), [2]).tolist() == ["a", "Mädchen"]
        for name, dtype, shape in [
            ("absent", np.float32, [3, 2]),
            ("values", np.float64, [3, 2]),
            ("values", np.float32, [3, 3]),
            ("values", np.float32, [3]),
            ("values", h5py.string_dtype(), [3, 2]),
            ("words", "S8", [2]),
        ]:
            with pytest.raises(ValueError, match=name):
                read_dataset(file, name, dtype, shape)


def test_a_dataset_larger_than_its_file_is_an_error(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file.create_dataset("values", shape=(10**12,), dtype=np.float64, chunks=(1024,))[5] = 1
        with pytest.raises(ValueError, match="values is not stored completely"):
            read_dataset(file, "values", np.float64, [None])


def test_a_created_file_has_schema_and_data(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    with create_artifact(path, SCHEMA) as file:
        file["values"] = [1, 2, 3]
        file["words"] = ["a", "Mädchen"]
    with open_artifact(path, SCHEMA, REMEDY) as file:
        assert file["values"][:].tolist() == [1, 2, 3]
        assert file["words"].asstr()[:].tolist() == ["a", "Mädchen"]


# A limit of the file size fails like a full disk, and needs no mount.
FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from pipeline.artifacts import Schema
from pipeline.errors import run
from pipeline.hdf5 import create_artifact
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()), resource.RLIM_INFINITY))
def main(path: Path) -> None:
    with create_artifact(path, Schema("gridcap.test", 2)) as file:
        values = file.create_dataset("values", shape=(64, 0), maxshape=(64, None), chunks=(1, 512), dtype=np.float32)
        for size in range(512, 4096, 512):
            values.resize(size, axis=1)
            values[:, size - 512 :] = size
            # HDF5 reads the heap of strings back.
            file[f"words{size}"] = [f"word {i}" * (i % 7) for i in range(500)]
run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 100, 2048, 8192, 100_000, 900_000])
def test_a_full_disk_is_one_sentence_with_file_and_free_space(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file.h5"
    command = [sys.executable, "-c", FULL_DISK, path, str(size)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: {path}: cannot be written (")
    assert "bytes are free" in result.stderr
    assert result.stderr.count("\n") == 1
