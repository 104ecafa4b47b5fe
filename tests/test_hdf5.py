from pathlib import Path

import h5py
import pytest

from pipeline.artifacts import Schema
from pipeline.errors import UserError
from pipeline.hdf5 import open_artifact

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
