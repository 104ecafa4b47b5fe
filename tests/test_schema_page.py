"""docs/features.md tells the truth about the files of a feature store."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest

from pipeline.features.images import PART, View
from pipeline.features.store import INDEX_FILE, SCHEMA_VERSION, FeatureStore, write_index, write_shard
from tests.factories import small_spec

PAGE = (Path(__file__).parents[1] / "docs" / "features.md").read_text()
SETTING = small_spec(compiled=True, grid_width=3, channels=4)
VIEWS = ("center_flipped", "whole")
CONTENTS = {5: "a" * 64, 7: "b" * 64, 1_000_000: "c" * 64}
SIZES = {"N": 4, "P": 6, "C": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of three images of two views, in shards of two and of four rows."""
    folder = tmp_path / "data/features"
    grids = np.arange(6 * 6 * 4, dtype=np.float16).reshape(6, 6, 4)
    keys = [(content, view) for content in CONTENTS.values() for view in reversed(VIEWS)]
    ids = [image_id for image_id in CONTENTS for _ in VIEWS]
    shards = [
        write_shard(folder, SETTING, ids[:2], keys[:2], grids[:2]),
        write_shard(folder, SETTING, ids[2:], keys[2:], grids[2:]),
    ]
    write_index(folder, SETTING, VIEWS, shards, CONTENTS)
    return folder


@pytest.fixture
def index(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / INDEX_FILE).read_text())
    return document


@pytest.fixture
def shard(folder: Path, index: dict[str, Any]) -> Path:
    path: Path = folder / index["shards"][1]["file"]
    return path


def table(head: str) -> dict[str, list[str]]:
    """Cells of the page's table whose first column has this head, without backticks, by the first."""
    _, _, rest = PAGE.partition(f"\n| {head} | ")
    _, _, rows = rest.partition("--- |\n")
    lines = rows.partition("\n\n")[0].splitlines()
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return {name: others for name, *others in cells}


def json_type(value: object) -> str:
    return {dict: "object", list: "array", str: "string", int: "integer"}[type(value)]


def attribute_type(file: h5py.File, name: str) -> str:
    dtype = file.attrs.get_id(name).dtype
    string = h5py.check_string_dtype(dtype)
    if string is None:
        return str(dtype)
    assert (string.encoding, string.length) == ("utf-8", None)
    return "string"


def test_the_keys_of_the_index_are_those_of_the_file(index: dict[str, Any]) -> None:
    found = {name: json_type(value) for name, value in index.items()}
    for entry in index["shards"]:
        found |= {f"shards[].{name}": json_type(value) for name, value in entry.items()}
    assert {name: cells[0] for name, cells in table("key").items()} == found


def test_the_index_names_shards_rows_and_the_setting(folder: Path, index: dict[str, Any]) -> None:
    attributes = list(table("attribute"))
    spec = attributes[attributes.index("architecture") :]
    names = [entry["file"] for entry in index["shards"]]
    assert index["views"] == list(VIEWS)
    assert set(index["setting"]) == set(spec)
    assert {path.name for path in folder.glob("shard-*.h5")} == set(names)
    for entry in index["shards"]:
        assert sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        with h5py.File(folder / entry["file"]) as file:
            assert file["grid"].shape[0] == entry["rows"]
            assert file.attrs["fingerprint"] == index["fingerprint"]
            assert {name: file.attrs[name] for name in spec} == index["setting"]
    for image_id, content in CONTENTS.items():
        for (number, row), view in zip(index["images"][str(image_id)], VIEWS, strict=True):
            with h5py.File(folder / names[number]) as file:
                assert (file["content"].asstr()[row], file["view"].asstr()[row]) == (content, view)


def test_the_attributes_are_those_of_the_file(shard: Path) -> None:
    with h5py.File(shard) as file:
        found = {name: attribute_type(file, name) for name in file.attrs}
    assert {name: cells[0] for name, cells in table("attribute").items()} == found


def test_the_datasets_are_those_of_the_file(shard: Path) -> None:
    told = {
        name: (np.dtype(dtype), tuple(SIZES[size] for size in shape.split(" x ")))
        for name, (dtype, shape, _) in table("dataset").items()
    }
    with h5py.File(shard) as file:
        assert told == {name: (dataset.dtype, dataset.shape) for name, dataset in file.items()}
        assert all(dataset.attrs["description"] for dataset in file.values())


def test_the_version_is_that_of_the_store(index: dict[str, Any]) -> None:
    assert f"this page describes {SCHEMA_VERSION}." in table("key")["schema_version"][1]
    assert index["schema_version"] == SCHEMA_VERSION


def test_the_views_are_those_that_are_read() -> None:
    (sentence,) = re.findall(r"The views are (.*?) and each of them mirrored", PAGE, re.DOTALL)
    parts = re.findall(r"`(\w+)`", sentence)
    assert {*parts, *(f"{part}_flipped" for part in parts)} == set(get_args(View))
    (numerator, denominator) = re.findall(r"are (\d)/(\d) of its width", PAGE)[0]
    assert int(numerator) / int(denominator) == PART


def test_the_example_reads_a_grid_without_gridcap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert "pipeline" not in block
    monkeypatch.chdir(folder.parents[1])
    names: dict[str, Any] = {}
    exec(block, names)
    grid = FeatureStore(folder).grid(1_000_000)
    assert names["grid"].dtype == np.float16
    assert np.array_equal(names["grid"], grid)
    for region in range(6):
        assert np.array_equal(names["cells"][region // 3, region % 3], grid[region])


def test_rows_may_be_mapped_where_the_page_says(folder: Path, index: dict[str, Any], shard: Path) -> None:
    (formula,) = re.findall(r"`(file\[\"grid\"\].id.get_offset\(\) \+ .*?)`", PAGE)
    number, row = index["images"]["1000000"][0]
    assert number == 1
    with h5py.File(shard) as file:
        assert file["grid"].chunks is None
        assert file["grid"].compression is None
        offset = eval(formula, {"file": file, "i": row, **SIZES})
    mapped = np.memmap(shard, dtype="<f2", mode="r", offset=offset, shape=(6, 4))
    assert np.array_equal(mapped, FeatureStore(folder).grid(1_000_000))
