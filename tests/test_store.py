import functools
import json
import multiprocessing
import operator
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import artifacts
from pipeline.errors import UserError
from pipeline.features import store as store_module
from pipeline.features.store import (
    INDEX_FILE,
    SCHEMA,
    FeatureStore,
    Shard,
    intact_shards,
    write_index,
    write_shard,
)
from tests.factories import small_spec

SPEC = small_spec(
    layer="layer4", weights_digest="ab" * 32, image_height=96, image_width=96, grid_height=3, grid_width=3, channels=16
)
IMAGE_IDS = [3, 10, 11, 2**40, 2**40 + 1]


def digest(image_id: int) -> str:
    return sha256(str(image_id).encode()).hexdigest()


def random_grids(image_ids: list[int]) -> np.ndarray:
    rows = [np.random.default_rng(image_id).standard_normal((9, 16)) for image_id in image_ids]
    return np.array(rows).astype(np.float16)


def make_shard(folder: Path, image_ids: list[int]) -> Shard:
    keys = [(digest(image_id), "whole") for image_id in image_ids]
    return write_shard(folder, SPEC, image_ids, keys, random_grids(image_ids))


def make_store(folder: Path, *parts: list[int]) -> list[Shard]:
    """Write a store with a shard for each list of image ids."""
    shards = [make_shard(folder, part) for part in parts]
    image_digests = {image_id: digest(image_id) for part in parts for image_id in part}
    write_index(folder, SPEC, ("whole",), shards, image_digests)
    return shards


@pytest.fixture
def folder(tmp_path) -> Path:
    """A store of five images in two shards."""
    make_store(tmp_path, IMAGE_IDS[:3], IMAGE_IDS[3:])
    return tmp_path


def test_grids_are_read_by_image_id(folder):
    store = FeatureStore(folder, SPEC.fingerprint)

    assert store.image_ids == tuple(IMAGE_IDS)
    assert store.spec == SPEC
    assert store.grid_shape == (9, 16)
    assert store.channels == 16
    order = [2**40, 3, 11, 3]
    assert store.grids(order).dtype == np.float16
    assert np.array_equal(store.grids(order), random_grids(order))
    assert store.image_digest(11) == digest(11)
    assert np.array_equal(store.grid(10), random_grids([10])[0])
    assert store.grids([]).shape == (0, 9, 16)


def test_the_index_describes_the_shards(folder):
    index = json.loads((folder / INDEX_FILE).read_text())

    assert index["fingerprint"] == SPEC.fingerprint
    assert [entry["rows"] for entry in index["shards"]] == [3, 2]
    for entry in index["shards"]:
        assert sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    assert index["images"]["10"] == [[0, 1]]


def test_an_index_is_read_in_parts(folder, monkeypatch):
    monkeypatch.setattr(artifacts, "_MEMBERS_PER_PART", 2)

    store = FeatureStore(folder)

    assert store.image_ids == tuple(IMAGE_IDS)
    assert np.array_equal(store.grids(IMAGE_IDS[::-1]), random_grids(IMAGE_IDS[::-1]))
    (folder / INDEX_FILE).write_text((folder / INDEX_FILE).read_text().replace("[[1, 0]]", "[[1, 1]]"))
    with pytest.raises(UserError, match=r"index\.json: was altered"):
        FeatureStore(folder)


@pytest.mark.slow
def test_the_memory_of_an_open_store_is_that_of_its_arrays(tmp_path):
    keys = [(digest(image_id), "whole") for image_id in range(20_000)]
    shard = Shard(path=tmp_path / f"shard-{0:016}.h5", sha256="a" * 64, key_lines="\n".join(map(" ".join, keys)))
    write_index(tmp_path, SPEC, ("whole",), [shard], {image_id: key for image_id, (key, _) in enumerate(keys)})
    FeatureStore(tmp_path)  # imports
    tracemalloc.start()

    store = FeatureStore(tmp_path)

    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(store.image_ids) == 20_000
    assert size < 20_000 * 50
    assert peak < 20_000 * 500


def test_equal_rows_give_the_same_bytes(tmp_path):
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written.append(make_shard(tmp_path / name, IMAGE_IDS))
        np.random.default_rng().standard_normal(100_000)  # leaves other bytes in freed memory

    assert written[0].path.name == written[1].path.name
    assert written[0].path.read_bytes() == written[1].path.read_bytes()


def test_images_with_equal_files_share_a_row(tmp_path):
    write_index(tmp_path, SPEC, ("whole",), [make_shard(tmp_path, [3])], {3: digest(3), 4: digest(3)})

    store = FeatureStore(tmp_path)

    assert np.array_equal(store.grid(4), store.grid(3))


@pytest.mark.slow
@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_grids_do_not_depend_on_the_sharding(tmp_path_factory, sizes, seed):
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(seed)
    image_ids = rng.choice(10_000, sum(sizes), replace=False).tolist()
    parts = np.split(np.array(image_ids), np.cumsum(sizes)[:-1])
    shards = make_store(folder, *(part.tolist() for part in parts))

    assert sorted(intact_shards(folder, SPEC), key=str) == sorted(shards, key=str)
    assert np.array_equal(FeatureStore(folder).grids(image_ids), random_grids(image_ids))


def test_views_are_read_by_index(tmp_path):
    grids = random_grids([1, 2, 3, 4])
    keys = [("a" * 64, "whole"), ("b" * 64, "center"), ("b" * 64, "whole"), ("a" * 64, "center")]
    shard = write_shard(tmp_path, SPEC, [1, 2, 2, 1], keys, grids)
    write_index(tmp_path, SPEC, ("whole", "center"), [shard], {1: "a" * 64, 2: "b" * 64})

    store = FeatureStore(tmp_path)

    assert np.array_equal(store.grids([1, 2]), grids[[0, 2]])
    assert np.array_equal(store.grids([2, 1, 2], [1, 0, 0]), grids[[1, 0, 2]])


def test_every_shard_is_verified(folder):
    store = FeatureStore(folder)
    assert store.verify() == 2

    first, second = sorted(folder.glob("shard-*.h5"))
    damage_by_one_bit(first)
    second.unlink()
    with pytest.raises(UserError) as error:
        store.verify()

    assert f"{first}: SHA-256 differs" in str(error.value)
    assert f"{second}: cannot be read (No such file" in str(error.value)


def test_verified_reads_reject_an_altered_shard_at_its_first_row(folder):
    first, second = sorted(folder.glob("shard-*.h5"))
    damage_by_one_bit(first)
    store, unverified = FeatureStore(folder, verify_reads=True), FeatureStore(folder)
    with h5py.File(second) as file:
        intact_ids = file["image_id"][:].tolist()
    assert np.array_equal(store.grids(intact_ids), unverified.grids(intact_ids))
    with pytest.raises(UserError, match=r"SHA-256 differs from index\.json") as error:
        pickle.loads(pickle.dumps(store)).grids(store.image_ids)
    assert str(first) in str(error.value)
    unverified.grids(store.image_ids)


def damage_by_truncation(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_by_one_bit(path: Path) -> None:
    file = bytearray(path.read_bytes())
    file[len(file) // 2] ^= 1
    path.write_bytes(file)


def damage_by_a_kill_before_the_digest(path: Path) -> None:
    path.with_suffix(".sha256").unlink()


def damage_of_the_digest(path: Path) -> None:
    path.with_suffix(".sha256").write_bytes(b"\xff\xfe")


def replace_by_another_file(path: Path) -> None:
    path.write_bytes(b"no HDF5 file")
    path.with_suffix(".sha256").write_text(sha256(path.read_bytes()).hexdigest() + "\n")


def replace_by_another_spec(path: Path) -> None:
    other = write_shard(path.parent, replace(SPEC, image_width=64), [3], [(digest(3), "whole")], random_grids([3]))
    os.replace(other.path, path)
    os.replace(other.path.with_suffix(".sha256"), path.with_suffix(".sha256"))


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_truncation,
        damage_by_one_bit,
        damage_by_a_kill_before_the_digest,
        damage_of_the_digest,
        replace_by_another_file,
        replace_by_another_spec,
    ],
)
def test_a_damaged_shard_is_not_reused(tmp_path, caplog, damage):
    good, bad = make_shard(tmp_path, [1, 2]), make_shard(tmp_path, [3, 4])
    damage(bad.path)
    (tmp_path / f".{good.path.name}.partial").write_bytes(b"half")

    assert intact_shards(tmp_path, SPEC) == [good]
    assert f"{bad.path}: unfinished or damaged" in caplog.text
    assert not bad.path.exists()
    assert not list(tmp_path.glob(".*"))


def test_an_unknown_image_is_an_error(folder):
    with pytest.raises(UserError, match=r"index\.json: has no image 12\."):
        FeatureStore(folder).grids([3, 12])


def test_another_fingerprint_is_an_error_that_names_both(folder):
    with pytest.raises(UserError, match=f"{SPEC.fingerprint}, expected 0123456789abcdef"):
        FeatureStore(folder, "0123456789abcdef")


def test_another_schema_version_is_an_error_that_names_both(folder):
    index = json.loads((folder / INDEX_FILE).read_text())
    other_version = SCHEMA.version + 1
    (folder / INDEX_FILE).write_text(json.dumps(index | {"schema_version": other_version, "images": []}))

    with pytest.raises(UserError, match=rf"version {other_version}, .* version {SCHEMA.version}\."):
        FeatureStore(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({"schema": SCHEMA.name, "schema_version": SCHEMA.version}),
    ],
)
def test_a_damaged_index_is_an_error(folder, text):
    (folder / INDEX_FILE).write_text(text)

    with pytest.raises(UserError, match=r"index\.json: .* Run `dvc repro -f -s encode`"):
        FeatureStore(folder)


@pytest.mark.parametrize(
    ("keys", "value", "fault"),
    [
        (["shards", 0, "file"], "../../shard-0123456789abcdef.h5", "shards[0].file"),
        (["shards", 0, "file"], "/etc/shard-0123456789abcdef.h5", "shards[0].file"),
        (["shards", 0, "sha256"], "x" * 64, "shards[0].sha256"),
        (["shards", 0, "rows"], 10**30, "shards[0].rows"),
        (["shards", 0, "rows"], -1, "shards[0].rows"),
        (["views"], [], "views"),
        (["views"], ["sideways"], "views[0]"),
        (["views"], ["whole", "center"], "image 3 has 1 rows, but there are 2 views"),
        (["fingerprint"], "0123456789abcdef", "that of the spec is"),
        (["spec", "channels"], 17, "that of the spec is"),
        (["spec", "weights_digest"], "\ud800", "spec.weights_digest"),
        (["images", "10"], [[0, 3]], "image 10 has row 3 of shard 0, which does not exist"),
        (["images", "10"], [[2, 0]], "image 10 has row 0 of shard 2, which does not exist"),
        (["images", "10"], [[-1, 0]], "image 10 has row 0 of shard -1, which does not exist"),
        (["images", "10"], [[0, -1]], "image 10 has row -1 of shard 0, which does not exist"),
        (["images", "10"], [[0, 10**30]], "image 10 has row"),
        (["images", str(2**63)], [[0, 0]], f"images.{2**63}"),
    ],
)
def test_an_index_out_of_bounds_is_an_error(folder, keys, value, fault):
    index = json.loads((folder / INDEX_FILE).read_text())
    *parents, last = keys
    functools.reduce(operator.getitem, parents, index)[last] = value
    (folder / INDEX_FILE).write_text(json.dumps(index))

    with pytest.raises(UserError, match=r"index\.json: .* Run `dvc repro -f -s encode`") as error:
        FeatureStore(folder)

    assert fault in str(error.value) or "Invalid JSON" in str(error.value)


def test_an_image_that_the_index_lists_twice_is_an_error(folder):
    text = (folder / INDEX_FILE).read_text().replace('"10":', '"11":')
    (folder / INDEX_FILE).write_text(text)

    with pytest.raises(UserError, match=r'index\.json: has two values of the key "11"\.'):
        FeatureStore(folder)


def test_a_missing_store_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"index\.json: no such file\."):
        FeatureStore(tmp_path)


def test_a_missing_or_truncated_shard_is_an_error(folder):
    first, second = (folder / entry["file"] for entry in json.loads((folder / INDEX_FILE).read_text())["shards"])
    first.unlink()
    second.write_bytes(second.read_bytes()[:500])

    for path, image_id in ((first, 3), (second, 2**40)):
        for image_ids in ([image_id], [image_id] * 2):
            with pytest.raises(UserError, match=f"{path.name}: .* Run `dvc repro -f -s encode`"):
                FeatureStore(folder).grids(image_ids)


def test_a_shard_truncated_while_open_is_an_error(folder):
    store = FeatureStore(folder)
    store.grid(3)
    for path in folder.glob("shard-*.h5"):
        os.truncate(path, 100)

    with pytest.raises(UserError, match=r"shard-.*\.h5: truncated at row 1"):
        store.grid(10)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"fingerprint": "0123456789abcdef"}, "0123456789abcdef, expected"),
        ({"schema_version": 99}, "version 99"),
        ({}, "grid"),
    ],
)
def test_a_shard_of_another_store_is_an_error(folder, attributes, message):
    path = folder / json.loads((folder / INDEX_FILE).read_text())["shards"][0]["file"]
    header = {"schema": SCHEMA.name, "schema_version": SCHEMA.version, "fingerprint": SPEC.fingerprint}
    with h5py.File(path, "w") as file:
        file.attrs.update(header | attributes)
        file["grid"] = np.zeros((3, 9, 17), dtype=np.float16)

    with pytest.raises(UserError, match=f"{path.name}: .*{message}"):
        FeatureStore(folder).grid(3)


GRID_OF_THE_INDEX = np.zeros((3, 9, 16), dtype=np.float16)


@pytest.mark.parametrize(
    "create",
    [
        lambda file: file.create_group("grid"),
        lambda file: file.create_dataset("grid", data=GRID_OF_THE_INDEX.astype(np.float32)),
        lambda file: file.create_dataset("grid", data=GRID_OF_THE_INDEX[:2]),
        lambda file: file.create_dataset("grid", shape=(10**9, 9, 16), dtype=np.float16),
        lambda file: file.create_dataset("grid", shape=(3, 9, 16), dtype=np.float16),
        lambda file: file.create_dataset("grid", data=GRID_OF_THE_INDEX, compression="gzip"),
        lambda file: file.create_dataset("grid", (3, 9, 16), np.float16, external=[("/etc/passwd", 0, 864)]),
        lambda file: file.attrs.update(fingerprint=np.arange(3)),
        lambda file: file.attrs.update(fingerprint=h5py.Empty("f")),
    ],
)
def test_a_shard_that_differs_from_its_index_is_an_error(folder: Path, create: Callable[[h5py.File], object]) -> None:
    path = folder / json.loads((folder / INDEX_FILE).read_text())["shards"][0]["file"]
    with h5py.File(path, "r+") as file:
        del file["grid"]
        create(file)

    with pytest.raises(UserError, match=rf"{path.name}: .* Run `dvc repro -f -s encode`\."):
        FeatureStore(folder).grid(3)


def test_a_store_can_be_pickled(folder):
    store = FeatureStore(folder)
    store.grids(IMAGE_IDS)

    copy = pickle.loads(pickle.dumps(store))

    assert np.array_equal(copy.grids(IMAGE_IDS), random_grids(IMAGE_IDS))


class GridDataset(torch.utils.data.Dataset[np.ndarray]):
    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return 4 * len(IMAGE_IDS)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.store.grid(IMAGE_IDS[index % len(IMAGE_IDS)])


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_data_loader_workers_share_a_store(folder, start_method):
    store = FeatureStore(folder)
    store.grids(IMAGE_IDS)
    loader = torch.utils.data.DataLoader(
        GridDataset(store),
        batch_size=5,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(start_method),
    )

    for batch in loader:
        assert np.array_equal(batch.numpy(), random_grids(IMAGE_IDS))
        assert np.array_equal(store.grids(IMAGE_IDS), random_grids(IMAGE_IDS))


@pytest.mark.slow
def test_threads_share_a_store_with_fewer_open_files_than_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_MAX_OPEN_SHARDS", 2)
    image_ids = list(range(24))
    make_store(tmp_path, *([image_id] for image_id in image_ids))
    store, expected = FeatureStore(tmp_path), random_grids(image_ids)
    equal: list[bool] = []

    def read(order: list[int]) -> None:
        equal.extend(np.array_equal(store.grids(order), expected[order]) for _ in range(5))

    threads = [threading.Thread(target=read, args=(image_ids[start:] + image_ids[:start],)) for start in (0, 7, 15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert equal == [True] * 15
    open_files = [path for path in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(path.resolve())]
    assert len(open_files) <= 2


def test_reading_a_store_does_not_import_torch(folder):
    script = (
        "import sys; from pathlib import Path; from pipeline.features.store import FeatureStore;"
        f"FeatureStore(Path({str(folder)!r})).grid(3); print('torch' in sys.modules)"
    )

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout == "False\n"
