"""Compare docs/features.md with the files of a feature store."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest

from pipeline.features.store import INDEX_FILE, SCHEMA, FeatureStore, write_index, write_shard
from pipeline.features.views import CROP_SCALE, View
from tests.factories import small_spec
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "features.md").read_text()
SPEC = small_spec(compiled=True, grid_width=3, channels=4)
VIEWS = ("center_flipped", "whole")
IMAGE_DIGESTS = {5: "a" * 64, 7: "b" * 64, 1_000_000: "c" * 64}
SIZES = {"N": 4, "P": 6, "C": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of three images with two views, in shards of two and four rows."""
    folder = tmp_path / "data/features"
    grids = np.arange(6 * 6 * 4, dtype=np.float16).reshape(6, 6, 4)
    keys = [(digest, view) for digest in IMAGE_DIGESTS.values() for view in reversed(VIEWS)]
    image_ids = [image_id for image_id in IMAGE_DIGESTS for _ in VIEWS]
    shards = [
        write_shard(folder, SPEC, image_ids[:2], keys[:2], grids[:2]),
        write_shard(folder, SPEC, image_ids[2:], keys[2:], grids[2:]),
    ]
    write_index(folder, SPEC, VIEWS, shards, IMAGE_DIGESTS)
    return folder


@pytest.fixture
def index(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / INDEX_FILE).read_text())
    return document


@pytest.fixture
def shard(folder: Path, index: dict[str, Any]) -> Path:
    path: Path = folder / index["shards"][1]["file"]
    return path


def page_table(header: str) -> dict[str, list[str]]:
    """Rows of the page's table whose first column has this header: first cell to the other cells."""
    _, _, after_header = PAGE.partition(f"\n| {header} | ")
    _, _, rows = after_header.partition("--- |\n")
    lines = rows.partition("\n\n")[0].splitlines()
    table = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return {name: cells for name, *cells in table}


def json_type(value: object) -> str:
    return {dict: "object", list: "array", str: "string", int: "integer"}[type(value)]


def attribute_type(file: h5py.File, name: str) -> str:
    dtype = file.attrs.get_id(name).dtype
    string = h5py.check_string_dtype(dtype)
    if string is None:
        return str(dtype)
    assert (string.encoding, string.length) == ("utf-8", None)
    return "string"


def test_the_page_lists_the_keys_of_the_index(index: dict[str, Any]) -> None:
    types = {name: json_type(value) for name, value in index.items()}
    for entry in index["shards"]:
        types |= {f"shards[].{name}": json_type(value) for name, value in entry.items()}
    assert {name: cells[0] for name, cells in page_table("key").items()} == types


def test_the_index_locates_shards_and_rows_and_has_the_spec(folder: Path, index: dict[str, Any]) -> None:
    attributes = list(page_table("attribute"))
    spec_names = attributes[attributes.index("architecture") :]
    files = [entry["file"] for entry in index["shards"]]
    assert index["views"] == list(VIEWS)
    assert set(index["spec"]) == set(spec_names)
    assert {path.name for path in folder.glob("shard-*.h5")} == set(files)
    for entry in index["shards"]:
        assert sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        with h5py.File(folder / entry["file"]) as file:
            assert file["grid"].shape[0] == entry["rows"]
            assert file.attrs["fingerprint"] == index["fingerprint"]
            assert {name: file.attrs[name] for name in spec_names} == index["spec"]
    for image_id, digest in IMAGE_DIGESTS.items():
        for (i, row), view in zip(index["images"][str(image_id)], VIEWS, strict=True):
            with h5py.File(folder / files[i]) as file:
                assert (file["sha256"].asstr()[row], file["view"].asstr()[row]) == (digest, view)
                assert file["image_id"][row] == image_id


def test_the_page_lists_the_attributes_of_a_shard(shard: Path) -> None:
    with h5py.File(shard) as file:
        types = {name: attribute_type(file, name) for name in file.attrs}
    assert {name: cells[0] for name, cells in page_table("attribute").items()} == types


def test_the_page_lists_the_datasets_of_a_shard(shard: Path) -> None:
    documented = {
        name: (np.dtype(dtype), tuple(SIZES[size] for size in shape.split(" x ")))
        for name, (dtype, shape, _) in page_table("dataset").items()
    }
    with h5py.File(shard) as file:
        assert documented == {name: (dataset.dtype, dataset.shape) for name, dataset in file.items()}
        assert all(len(dataset.attrs["description"]) > 20 for dataset in file.values())


def test_the_page_describes_the_current_version(index: dict[str, Any]) -> None:
    assert f"this page describes {SCHEMA.version}." in page_table("key")["schema_version"][1]
    assert (index["schema"], index["schema_version"]) == SCHEMA


def test_the_page_lists_the_views() -> None:
    (sentence,) = re.findall(r"The views are (.*?) and each of them mirrored", PAGE, re.DOTALL)
    crops = re.findall(r"`(\w+)`", sentence)
    assert {*crops, *(f"{crop}_flipped" for crop in crops)} == set(get_args(View))
    (numerator, denominator) = re.findall(r"crops of\s+(\d)/(\d) of its width", PAGE)[0]
    assert int(numerator) / int(denominator) == CROP_SCALE


def test_the_examples_read_a_grid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, with_gridcap = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert "gridcap" not in plain
    monkeypatch.chdir(folder.parents[1])
    grid = FeatureStore(folder).grid(1_000_000)
    names: dict[str, Any] = {}

    exec(plain, names)

    assert names["grid"].dtype == np.float16
    assert np.array_equal(names["grid"], grid)
    for region in range(6):
        assert np.array_equal(names["cells"][region // 3, region % 3], grid[region])
    exec(with_gridcap, names)
    assert np.array_equal(names["grid"], grid)


def test_rows_can_be_mapped_at_the_documented_offset(folder: Path, index: dict[str, Any], shard: Path) -> None:
    (formula,) = re.findall(r"`(file\[\"grid\"\].id.get_offset\(\) \+ .*?)`", PAGE)
    i, row = index["images"]["1000000"][0]
    assert i == 1
    with h5py.File(shard) as file:
        assert file["grid"].chunks is None
        assert file["grid"].compression is None
        offset = eval(formula, {"file": file, "i": row, **SIZES})
    mapped = np.memmap(shard, dtype="<f2", mode="r", offset=offset, shape=(6, 4))
    assert np.array_equal(mapped, FeatureStore(folder).grid(1_000_000))
