import json
import multiprocessing
import pickle
import subprocess
import sys
import threading
from hashlib import sha256
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.features import store as store_module
from pipeline.features.store import (
    INDEX_FILE,
    FeatureStore,
    Shard,
    intact_shards,
    write_index,
    write_shard,
)
from tests.factories import small_spec

SETTING = small_spec(layer="layer4", weights_digest="ab" * 32, image_size=96, grid_height=3, grid_width=3, channels=16)
WHOLE = ("whole",)
PYTHON = [sys.executable, "-c"]
IMAGE_IDS = [3, 10, 11, 2**40, 2**40 + 1]


def content(image_id: int) -> str:
    return sha256(str(image_id).encode()).hexdigest()


def grids(image_ids: list[int]) -> np.ndarray:
    rows = [np.random.default_rng(image_id).standard_normal((9, 16)) for image_id in image_ids]
    return np.array(rows).astype(np.float16)


def shard(folder: Path, image_ids: list[int]) -> Shard:
    return write_shard(
        folder, SETTING, image_ids, [(content(image_id), "whole") for image_id in image_ids], grids(image_ids)
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """A store of five images in two shards."""
    shards = [shard(tmp_path, IMAGE_IDS[:3]), shard(tmp_path, IMAGE_IDS[3:])]
    write_index(tmp_path, SETTING, WHOLE, shards, {image_id: content(image_id) for image_id in IMAGE_IDS})
    return tmp_path


def test_grids_come_back_by_image_id(folder):
    store = FeatureStore(folder, SETTING.fingerprint)

    assert store.image_ids == tuple(IMAGE_IDS)
    assert store.spec == SETTING
    assert store.grid_shape == (9, 16)
    assert store.channels == 16
    order = [2**40, 3, 11, 3]
    assert store.grids(order).dtype == np.float16
    assert np.array_equal(store.grids(order), grids(order))
    assert np.array_equal(store.grid(10), grids([10])[0])
    assert store.grids([]).shape == (0, 9, 16)


def test_any_hdf5_tool_can_read_a_shard_and_learn_what_it_holds(folder):
    path = folder / json.loads((folder / INDEX_FILE).read_text())["shards"][0]["file"]

    with h5py.File(path, "r") as file:
        assert file.attrs["schema"] == "gridcap.features"
        assert file.attrs["schema_version"] == 2
        assert file.attrs["fingerprint"] == SETTING.fingerprint
        assert (file.attrs["architecture"], file.attrs["layer"]) == ("resnet18", "layer4")
        assert (file.attrs["grid_height"], file.attrs["grid_width"], file.attrs["channels"]) == (3, 3, 16)
        assert (file.attrs["weights_digest"], file.attrs["precision"]) == ("ab" * 32, "float32")
        assert file.attrs["image_size"] == 96
        assert set(file) == {"grid", "image_id", "content", "view"}
        assert file["grid"].dtype == np.float16
        assert file["grid"].chunks is None
        assert file["image_id"][:].tolist() == IMAGE_IDS[:3]
        assert file["content"].dtype == "S64"
        assert all(len(file[name].attrs["description"]) > 20 for name in file)


def test_the_index_describes_the_shards(folder):
    index = json.loads((folder / INDEX_FILE).read_text())

    assert index["fingerprint"] == SETTING.fingerprint
    assert [entry["rows"] for entry in index["shards"]] == [3, 2]
    for entry in index["shards"]:
        assert sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    assert index["images"]["10"] == [[0, 1]]


def test_equal_rows_make_equal_files(tmp_path):
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written.append(shard(tmp_path / name, IMAGE_IDS))
        junk = np.random.default_rng().standard_normal(100_000)
        del junk

    assert written[0].path.name == written[1].path.name
    assert written[0].path.read_bytes() == written[1].path.read_bytes()


def test_two_images_may_share_a_row(tmp_path):
    write_index(tmp_path, SETTING, WHOLE, [shard(tmp_path, [3])], {3: content(3), 4: content(3)})

    store = FeatureStore(tmp_path)

    assert np.array_equal(store.grid(4), store.grid(3))


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_what_is_written_is_read_however_it_is_sharded(tmp_path_factory, sizes, seed):
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(seed)
    image_ids = rng.choice(10_000, sum(sizes), replace=False).tolist()
    parts = np.split(np.array(image_ids), np.cumsum(sizes)[:-1])
    shards = [shard(folder, part.tolist()) for part in parts]
    write_index(folder, SETTING, WHOLE, shards, {image_id: content(image_id) for image_id in image_ids})

    assert sorted(intact_shards(folder), key=str) == sorted(shards, key=str)
    assert np.array_equal(FeatureStore(folder).grids(image_ids), grids(image_ids))


def damage_by_truncation(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_by_one_bit(path: Path) -> None:
    file = bytearray(path.read_bytes())
    file[len(file) // 2] ^= 1
    path.write_bytes(file)


def damage_by_a_kill_before_the_digest(path: Path) -> None:
    path.with_suffix(".sha256").unlink()


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_one_bit, damage_by_a_kill_before_the_digest])
def test_a_damaged_shard_is_not_reused(tmp_path, capsys, damage):
    good, bad = shard(tmp_path, [1, 2]), shard(tmp_path, [3, 4])
    damage(bad.path)
    (tmp_path / f".{good.path.name}.partial").write_bytes(b"half")

    assert intact_shards(tmp_path) == [good]
    assert f"{bad.path}: is unfinished or damaged" in capsys.readouterr().err
    assert not bad.path.exists()
    assert not list(tmp_path.glob(".*"))


def test_an_unknown_image_is_named(folder):
    with pytest.raises(UserError, match=r"index\.json: has no image 12; run `dvc repro encode`"):
        FeatureStore(folder).grids([3, 12])


def test_a_foreign_setting_is_refused_naming_both(folder):
    with pytest.raises(UserError, match=f"setting {SETTING.fingerprint}, but 0123456789abcdef is needed"):
        FeatureStore(folder, "0123456789abcdef")


def test_another_schema_version_is_refused_naming_both(folder):
    index = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps(index | {"schema_version": 3, "images": []}))

    with pytest.raises(UserError, match=r"version 3, this gridcap reads gridcap\.features version 2"):
        FeatureStore(folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is no index of features"),
        ("[]", "is no index of features"),
        ('{"schema": "gridcap.features", "schema_version": 2}', "is damaged"),
    ],
)
def test_a_damaged_index_is_named(folder, text, told):
    (folder / INDEX_FILE).write_text(text)

    with pytest.raises(UserError, match=rf"index\.json: {told}"):
        FeatureStore(folder)


def test_a_missing_store_is_named(tmp_path):
    with pytest.raises(UserError, match=r"index\.json: no such file; run `dvc repro encode`"):
        FeatureStore(tmp_path)


def test_a_missing_truncated_or_foreign_shard_is_named(folder):
    first, second = (folder / entry["file"] for entry in json.loads((folder / INDEX_FILE).read_text())["shards"])
    first.unlink()
    second.write_bytes(second.read_bytes()[:500])

    for path, image_id in ((first, 3), (second, 2**40)):
        with pytest.raises(UserError, match=f"{path.name}: cannot be read"):
            FeatureStore(folder).grid(image_id)

    with h5py.File(first, "w") as file:
        file.attrs["fingerprint"] = "0123456789abcdef"
    with pytest.raises(UserError, match="setting 0123456789abcdef, not"):
        FeatureStore(folder).grid(3)


def test_a_pickled_store_carries_no_handles(folder):
    store = FeatureStore(folder)
    store.grids(IMAGE_IDS)

    again = pickle.loads(pickle.dumps(store))

    assert np.array_equal(again.grids(IMAGE_IDS), grids(IMAGE_IDS))


class Images(torch.utils.data.Dataset[np.ndarray]):
    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return 4 * len(IMAGE_IDS)

    def __getitem__(self, place: int) -> np.ndarray:
        return self.store.grid(IMAGE_IDS[place % len(IMAGE_IDS)])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_data_loader_share_a_store(folder, method):
    store = FeatureStore(folder)
    store.grids(IMAGE_IDS)
    loader = torch.utils.data.DataLoader(
        Images(store),
        batch_size=5,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(method),
    )

    for batch in loader:
        assert np.array_equal(batch.numpy(), grids(IMAGE_IDS))
        assert np.array_equal(store.grids(IMAGE_IDS), grids(IMAGE_IDS))


def test_threads_share_a_store_with_fewer_handles_than_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_HANDLES", 2)
    image_ids = list(range(24))
    shards = [shard(tmp_path, [image_id]) for image_id in image_ids]
    write_index(tmp_path, SETTING, WHOLE, shards, {image_id: content(image_id) for image_id in image_ids})
    store, wanted = FeatureStore(tmp_path), grids(image_ids)
    same: list[bool] = []

    def read(order: list[int]) -> None:
        same.extend(np.array_equal(store.grids(order), wanted[order]) for _ in range(5))

    threads = [threading.Thread(target=read, args=(image_ids[turn:] + image_ids[:turn],)) for turn in (0, 7, 15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert same == [True] * 15
    open_files = [path for path in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(path.resolve())]
    assert len(open_files) <= 2


def test_reading_a_store_loads_no_pytorch(folder):
    script = (
        "import sys; from pathlib import Path; from pipeline.features.store import FeatureStore;"
        f"FeatureStore(Path({str(folder)!r})).grid(3); print('torch' in sys.modules)"
    )

    result = subprocess.run([*PYTHON, script], capture_output=True, text=True, check=True)

    assert result.stdout == "False\n"
