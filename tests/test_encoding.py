import contextlib
import itertools
import json
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from glob import glob
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from pipeline.artifacts import publish
from pipeline.captions.records import Policy, Record, write_records
from pipeline.errors import UserError
from pipeline.features import encoding
from pipeline.features.encoder import EncodeParams, GridSize, ImageSize, encode_grids, load_encoder
from pipeline.features.encoding import ROWS_PER_SHARD, RUNS_FILE, EncodeCounts, EncodeResult, encode
from pipeline.features.images import read_image, read_views
from pipeline.features.near_duplicates import find_near_duplicates
from pipeline.features.quantization.quantized_encoder import supports_int8
from pipeline.features.resnets import encoder_frame
from pipeline.features.store import INDEX_FILE, FeatureStore, intact_shards
from pipeline.features.views import Frame
from pipeline.params import to_plain
from tests.command_line import torchrun
from tests.factories import encode_params
from tests.paths import REAL, ROOT

CPU = torch.device("cpu")


def write_image(path: Path, seed: int) -> None:
    """Write a small JPEG of random colors."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    coarse.resize((40, 32), Image.Resampling.BICUBIC).save(path, quality=90)


def exists(folder: Path, pattern: str) -> bool:
    """Whether a folder in which another process adds and deletes files, which Path.rglob does not allow, has a path."""
    return bool(glob(pattern, root_dir=folder, recursive=True, include_hidden=True))


def count_finished_rows(work: Path, finished: Path) -> int:
    """Count the rows of the finished shards in all work folders, of the same spec as a finished store."""
    spec = FeatureStore(finished).spec
    return sum(len(shard.keys) for folder in work.glob("*/") for shard in intact_shards(folder, spec))


@dataclass(frozen=True)
class Dataset:
    """A folder of images with params of `encode`."""

    folder: Path
    params: EncodeParams

    @property
    def image_dir(self) -> Path:
        return self.folder / "images"

    @property
    def out(self) -> Path:
        return self.folder / "features"

    def records(self) -> list[Record]:
        """Return a record for each image file, whose name is its id."""
        return [
            Record(image_id=int(path.stem), file=path.name, split="train", captions=("an image",))
            for path in sorted(self.image_dir.iterdir())
        ]

    def encode(
        self,
        work: str = "work",
        out: str = "features",
        num_threads: int = 2,
        bad_images: Policy = "error",
        records: list[Record] | None = None,
        **params: object,
    ) -> EncodeResult:
        records = self.records() if records is None else records
        encode_params = EncodeParams(**(vars(self.params) | params))
        folder = self.folder / work
        with encode(records, self.image_dir, encode_params, folder, CPU, num_threads, bad_images=bad_images) as result:
            publish(result.store, self.folder / out)
        return result

    def command(self, work: str = "work", out: str = "features") -> list[str]:
        """Return the command line of the stage on this dataset."""
        write_records(self.folder / "prepared", self.records())
        dataset = {"root": str(self.folder), "images": "images", "bad_images": "error"}
        params = {"dataset": dataset, "encode": to_plain(self.params)}
        (self.folder / "params.yaml").write_text(json.dumps(params))
        flags = {
            "params": "params.yaml",
            "prepared": "prepared",
            "out": out,
            "work": work,
            "metrics": "metrics.json",
        }
        paths = [f"--{name}={self.folder / path}" for name, path in flags.items()]
        return [sys.executable, "-m", "stages.encode_images", *paths, "--device=cpu", "--num-threads=2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


def make_dataset(folder: Path, weights: Path, num_images: int) -> Dataset:
    (folder / "images").mkdir()
    for image_id in range(num_images):
        write_image(folder / "images" / f"{image_id:04}.jpg", image_id)
    return Dataset(folder, encode_params(weights))


@pytest.fixture
def make(tmp_path, weights) -> Callable[[int], Dataset]:
    """Make a dataset with the given number of images."""
    return lambda num_images: make_dataset(tmp_path, weights, num_images)


@pytest.fixture(scope="module")
def encoded_dataset(tmp_path_factory, weights) -> Dataset:
    """Thirty encoded images."""
    dataset = make_dataset(tmp_path_factory.mktemp("thirty"), weights, 30)
    dataset.encode()
    return dataset


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_image_gets_its_grid(make):
    dataset = make(20)

    result = dataset.encode()

    assert result.counts == EncodeCounts(encoded=20, reused=0, removed=0, skipped=0, failed=0)
    assert result.metrics == {
        "num_images": 20,
        "num_skipped_images": 0,
        "num_views": 1,
        "num_shards": 1,
        "grid_height": 2,
        "grid_width": 2,
        "channels": 256,
        "bytes_per_image": 2048,
        "val_num_near_duplicates": 0,
        "test_num_near_duplicates": 0,
    }
    store, encoder = FeatureStore(dataset.out), load_encoder(dataset.params)
    assert store.image_ids == tuple(range(20))
    for image_id in (0, 7, 19):
        image = read_image(dataset.image_dir / f"{image_id:04}.jpg", 32)[None]
        expected = encode_grids(encoder, image)[0].astype(float)
        np.testing.assert_allclose(store.grid(image_id).astype(float), expected, atol=2e-3, rtol=2e-3)


def test_near_duplicates_are_searched_again_only_if_images_or_splits_change(make, monkeypatch):
    dataset = make(6)
    Image.open(dataset.image_dir / "0000.jpg").save(dataset.image_dir / "0005.jpg", quality=80)
    searches = []

    def count_search(*args):
        searches.append(args)
        return find_near_duplicates(*args)

    monkeypatch.setattr(encoding, "find_near_duplicates", count_search)
    records = [replace(record, split="val" if record.image_id == 5 else "train") for record in dataset.records()]
    results = [dataset.encode(records=records) for _ in range(2)]
    assert [result.near_duplicates for result in results] == [{"val": 1, "test": 0}] * 2
    assert len(searches) == 1
    published = read_files(dataset.out)

    records[5] = replace(records[5], split="test")
    assert dataset.encode(records=records).near_duplicates == {"val": 0, "test": 1}
    assert len(searches) == 2
    assert read_files(dataset.out) == published  # which pairs are similar does not depend on the name of the split


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision",
    [
        "float32",
        "bfloat16",
        pytest.param("int8", marks=pytest.mark.skipif(not supports_int8(), reason="this CPU has no VNNI instructions")),
    ],
)
def test_a_row_does_not_depend_on_batch_order_or_threads(make, precision):
    dataset = make(37)
    dataset.encode(precision=precision)
    grids = FeatureStore(dataset.out).grids(range(37))
    num_threads = torch.get_num_threads()

    for path in sorted(dataset.image_dir.iterdir()):
        path.rename(path.with_name(f"{5000 - int(path.stem) * 7 % 37}.jpg"))
    for image_id in (1, 5005, 5010):
        write_image(dataset.image_dir / f"{image_id}.jpg", 100 + image_id)
    torch.set_num_threads(1)
    try:
        dataset.encode(work="other-work", num_threads=5, precision=precision)
    finally:
        torch.set_num_threads(num_threads)

    shuffled = FeatureStore(dataset.out).grids([5000 - image_id * 7 % 37 for image_id in range(37)])
    assert np.array_equal(shuffled, grids)


@pytest.mark.slow
def test_encode_restores_the_number_of_torch_threads(make, tmp_path):
    def num_threads_of_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    dataset = make(40)
    before = torch.get_num_threads()

    dataset.encode()
    assert (torch.get_num_threads(), num_threads_of_a_new_thread()) == (before, before)

    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer3.1.bn2.weight"] = torch.full((256,), 1e9)
    save_file(state, tmp_path / "huge.safetensors")
    with pytest.raises(UserError, match="range of float16"):
        dataset.encode(weights=tmp_path / "huge.safetensors")
    assert (torch.get_num_threads(), num_threads_of_a_new_thread()) == (before, before)


@pytest.mark.slow
def test_two_runs_publish_the_same_bytes(make):
    dataset = make(ROWS_PER_SHARD + 5)

    dataset.encode(out="one")
    dataset.encode(out="two", work="other-work")

    assert read_files(dataset.folder / "one") == read_files(dataset.folder / "two")
    assert len(list((dataset.folder / "one").glob("shard-*.h5"))) == 2


def test_a_second_run_encodes_nothing(make):
    dataset = make(20)
    dataset.encode()
    before = read_files(dataset.out)
    shutil.rmtree(dataset.out)  # as DVC does before it runs a stage

    result = dataset.encode()

    assert result.counts == EncodeCounts(encoded=0, reused=20, removed=0, skipped=0, failed=0)
    assert read_files(dataset.out) == before


@pytest.mark.slow
def test_only_new_and_changed_images_are_encoded(make):
    dataset = make(20)
    dataset.encode()
    grids = FeatureStore(dataset.out).grids(range(20))

    write_image(dataset.image_dir / "0020.jpg", 20)
    added = dataset.encode()
    (dataset.image_dir / "0003.jpg").rename(dataset.image_dir / "0300.jpg")
    renamed = dataset.encode()
    write_image(dataset.image_dir / "0004.jpg", 44)
    edited = dataset.encode()
    (dataset.image_dir / "0005.jpg").unlink()
    removed = dataset.encode()
    write_image(dataset.image_dir / "0004.jpg", 4)
    restored = dataset.encode()

    runs = [
        (run.counts.encoded, run.counts.reused, run.counts.removed)
        for run in (added, renamed, edited, removed, restored)
    ]
    assert runs == [(1, 20, 0), (0, 21, 0), (1, 20, 1), (0, 20, 2), (0, 20, 2)]
    store = FeatureStore(dataset.out)
    assert store.image_ids == (0, 1, 2, 4, *range(6, 21), 300)
    assert np.array_equal(store.grids([0, 300, 4, 19]), grids[[0, 3, 4, 19]])
    assert restored.num_shards == 2
    assert len(list(dataset.out.glob("shard-*.h5"))) == 2


def test_equal_files_share_a_row(make):
    dataset = make(5)
    shutil.copy(dataset.image_dir / "0002.jpg", dataset.image_dir / "0009.jpg")

    result = dataset.encode()

    assert (result.counts.encoded, result.counts.reused) == (5, 1)
    index = json.loads((dataset.out / INDEX_FILE).read_text())
    assert index["images"]["2"] == index["images"]["9"]
    assert index["shards"][0]["rows"] == 5


def test_rows_are_shared_by_equal_specs_alone(make, weights, tmp_path):
    dataset = make(5)
    first = dataset.encode()
    smaller = dataset.encode(layer="layer2")
    copy = tmp_path / "same-weights.safetensors"
    shutil.copy(weights, copy)
    same = dataset.encode(weights=copy)

    assert (smaller.counts.encoded, smaller.counts.reused) == (5, 0)
    assert smaller.spec.fingerprint != first.spec.fingerprint
    assert (same.counts.encoded, same.counts.reused) == (0, 5)
    with pytest.raises(UserError, match=f"{first.spec.fingerprint}, expected {smaller.spec.fingerprint}"):
        FeatureStore(dataset.out, smaller.spec.fingerprint)


@pytest.mark.slow
def test_a_truncated_shard_is_encoded_again(make):
    dataset = make(ROWS_PER_SHARD + 5)
    dataset.encode()
    before = read_files(dataset.out)
    shard = min((dataset.folder / "work").rglob("shard-*.h5"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-7])

    result = dataset.encode()

    assert (result.counts.encoded, result.counts.reused) == (5, ROWS_PER_SHARD)
    assert read_files(dataset.out) == before


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["unreadable", "missing"])
def test_unreadable_images_are_listed_and_other_shards_are_kept(make, fault):
    dataset = make(3 * ROWS_PER_SHARD)
    dataset.encode(work="uninterrupted", out="uninterrupted-features")
    records, bad = dataset.records(), [dataset.image_dir / f"{i:04}.jpg" for i in (ROWS_PER_SHARD + 2, 200)]
    for path in bad:
        path.unlink()
        if fault == "unreadable":
            path.write_bytes(f"<html>{path}".encode())

    with (
        pytest.raises(UserError) as error,
        encode(records, dataset.image_dir, dataset.params, dataset.folder / "work", CPU, 2),
    ):
        pass

    assert all(f"{path}: " in str(error.value) for path in bad)
    assert f"{2 * ROWS_PER_SHARD} encoded, 0 reused, 0 removed, 0 skipped, 2 failed" in str(error.value)
    assert not dataset.out.exists()
    for path in bad:
        write_image(path, int(path.stem))
    result = dataset.encode()
    assert (result.counts.encoded, result.counts.reused) == (ROWS_PER_SHARD, 2 * ROWS_PER_SHARD)
    assert read_files(dataset.out) == read_files(dataset.folder / "uninterrupted-features")


def break_images(dataset: Dataset, *image_ids: int) -> None:
    """Replace image files by different files that are no images."""
    for image_id in image_ids:
        (dataset.image_dir / f"{image_id:04}.jpg").write_bytes(f"<html>{image_id}".encode() if image_id else b"")


def test_images_that_cannot_be_decoded_are_skipped_and_listed_in_the_index(make, caplog, monkeypatch):
    dataset = make(20)
    break_images(dataset, 0, 7)
    shutil.copy(dataset.image_dir / "0007.jpg", dataset.image_dir / "0020.jpg")
    decoded = []
    monkeypatch.setattr(encoding, "read_views", lambda *args: decoded.append(args[-1]) or read_views(*args))

    first = dataset.encode(bad_images="skip")
    before = read_files(dataset.out)
    num_decoded = len(decoded)
    second = dataset.encode(bad_images="skip")

    assert first.counts == EncodeCounts(encoded=18, reused=0, removed=0, skipped=3, failed=0)
    assert second.counts == EncodeCounts(encoded=0, reused=18, removed=0, skipped=3, failed=0)
    assert (first.metrics["num_images"], first.metrics["num_skipped_images"]) == (18, 3)
    assert read_files(dataset.out) == before
    # An image that cannot be decoded, or its copy, is tried once in every run.
    assert (num_decoded, len(decoded)) == (20, 22)
    assert json.loads(before[INDEX_FILE])["skipped"] == [0, 7, 20]
    store = FeatureStore(dataset.out)
    assert store.skipped_ids == {0, 7, 20}
    assert store.image_ids == (*range(1, 7), *range(8, 20))
    with pytest.raises(UserError, match="image 7 was skipped"):
        store.grid(7)
    with pytest.raises(UserError, match="has no image 21"):
        store.grid(21)
    assert f"3 images are skipped: {dataset.image_dir / '0000.jpg'}: not a supported image format" in caplog.text


def test_a_skipped_image_is_encoded_once_it_is_repaired(make):
    dataset = make(5)
    whole = dataset.encode(work="other", out="whole")
    break_images(dataset, 3)
    dataset.encode(bad_images="skip")
    write_image(dataset.image_dir / "0003.jpg", 3)

    repaired = dataset.encode(bad_images="skip")

    assert repaired.counts == EncodeCounts(encoded=1, reused=4, removed=0, skipped=0, failed=0)
    assert whole.num_images == repaired.num_images
    stores = FeatureStore(dataset.out), FeatureStore(dataset.folder / "whole")
    assert np.array_equal(*(store.grids(range(5)) for store in stores))
    assert stores[0].skipped_ids == frozenset()


def test_images_that_cannot_be_decoded_are_an_error_that_names_the_policy(make):
    dataset = make(5)
    break_images(dataset, 3)
    with pytest.raises(UserError, match=r"0003\.jpg: not a supported image format(.|\n)*dataset\.bad_images=skip"):
        dataset.encode()


def test_a_missing_image_is_an_error_even_if_bad_images_are_skipped(make):
    dataset = make(5)
    break_images(dataset, 2)
    records = dataset.records()
    (dataset.image_dir / "0003.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 5 images cannot be encoded:\n.*0003\.jpg: cannot be read"):
        dataset.encode(bad_images="skip", records=records)
    assert not dataset.out.exists()


def test_a_split_of_which_no_image_can_be_decoded_is_an_error(make):
    dataset = make(5)
    break_images(dataset, 2, 3)
    records = [replace(record, split="val") if record.image_id in (2, 3) else record for record in dataset.records()]
    with pytest.raises(UserError, match=r"images: none of the 2 images of split val can be decoded\."):
        dataset.encode(bad_images="skip", records=records)
    assert not dataset.out.exists()


def test_skipped_images_do_not_change_the_shards_of_an_interrupted_run(make, monkeypatch):
    monkeypatch.setattr(encoding, "ROWS_PER_SHARD", 4)
    dataset = make(19)
    # In shards with other images, alone in a shard, and in the last shard.
    break_images(dataset, 1, 6, 8, 9, 10, 11, 18)
    dataset.encode(bad_images="skip")
    expected = read_files(dataset.out)
    index = json.loads(expected[INDEX_FILE])
    assert sorted(shard["rows"] for shard in index["shards"]) == [2, 3, 3, 4]
    work = next((dataset.folder / "work" / "encode").glob("*/"))
    for finished in itertools.product((False, True), repeat=len(index["shards"])):
        for shard, is_finished in zip(index["shards"], finished, strict=True):
            if not is_finished:
                (work / shard["file"]).unlink()
        dataset.encode(bad_images="skip")
        assert read_files(dataset.out) == expected


def test_each_run_is_logged_with_its_counts(make):
    dataset = make(20)
    dataset.encode()
    write_image(dataset.image_dir / "0020.jpg", 20)
    dataset.encode()

    lines = (dataset.folder / "work" / "encode" / RUNS_FILE).read_text().splitlines()

    runs = [json.loads(line) for line in lines]
    assert [(run["encoded"], run["reused"], run["removed"], run["failed"]) for run in runs] == [
        (20, 0, 0, 0),
        (1, 20, 0, 0),
    ]
    assert runs[0].keys() >= {"ended", "fingerprint", "seconds", "processes"}


@pytest.mark.slow
def test_resume_after_kills_gives_the_same_bytes(make):
    dataset = make(3 * ROWS_PER_SHARD + 9)
    uninterrupted, metrics = dataset.command("uninterrupted", "uninterrupted-features"), dataset.folder / "metrics.json"
    command, work = dataset.command(), dataset.folder / "work" / "encode"
    rng = random.Random(20)

    def finished_shards() -> dict[str, int]:
        return {path.stem: path.stat().st_ino for path in work.rglob("shard-*.sha256") if "store" not in str(path)}

    def kill_when(condition: Callable[[float], object]) -> None:
        start = time.monotonic()
        with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not condition(time.monotonic() - start):
                time.sleep(0.0005)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    start = time.monotonic()
    subprocess.run(uninterrupted, cwd=ROOT, check=True, capture_output=True)
    duration = time.monotonic() - start
    expected_metrics = metrics.read_bytes()
    metrics.unlink()
    conditions: list[Callable[[float], object]] = [
        lambda _: exists(work, "**/*.h5.partial"),
        lambda _: exists(work, "**/store") or exists(dataset.folder, ".features.*"),
        *(partial(operator.lt, rng.uniform(0.3, 1) * duration) for _ in range(6)),
    ]
    rng.shuffle(conditions)
    finished: dict[str, int] = {}
    for condition in conditions:
        kill_when(condition)
        # Finished shards remain and are not written again.
        assert finished.items() <= finished_shards().items()
        finished = finished_shards()
    shutil.rmtree(dataset.out, ignore_errors=True)
    num_rows = count_finished_rows(work, dataset.folder / "uninterrupted-features")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    assert read_files(dataset.out) == read_files(dataset.folder / "uninterrupted-features")
    assert metrics.read_bytes() == expected_metrics
    counts = f"{len(dataset.records()) - num_rows} encoded, {num_rows} reused, 0 removed, 0 skipped, 0 failed"
    assert f"encode: {counts}" in result.stderr
    assert sorted(path.name for path in dataset.folder.glob(".*")) == []


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one_and_reuse_shards_of_a_killed_one(make):
    dataset = make(5 * ROWS_PER_SHARD + 3)
    dataset.encode(work="single", out="single-features")
    command = dataset.command()
    launch = torchrun(command, dataset.folder / "logs")
    work = dataset.folder / "work" / "encode"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    with subprocess.Popen(launch, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (rank_1 := find_rank(process.pid, 1)):
            time.sleep(0.01)
        while process.poll() is None and not exists(work, "**/shard-*.sha256"):
            time.sleep(0.001)
        os.kill(rank_1, signal.SIGKILL)
        process.communicate()
    assert process.returncode != 0
    assert not dataset.out.exists()
    num_rows = count_finished_rows(work, dataset.folder / "single-features")
    assert ROWS_PER_SHARD <= num_rows < len(dataset.records())
    resumed = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)

    assert resumed.returncode == 0, resumed.stderr
    counts = f"{len(dataset.records()) - num_rows} encoded, {num_rows} reused"
    assert resumed.stderr.count(f"encode: {counts}") == 1
    assert read_files(dataset.out) == read_files(dataset.folder / "single-features")
    assert json.loads((work / RUNS_FILE).read_text())["processes"] == 2


def find_rank(launcher: int, rank: int) -> int:
    """Return the process id of a rank that `launcher` started, or 0 if it has not started yet."""
    for process in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank):
                return process.pid
    return 0


@pytest.mark.slow
@settings(max_examples=8)
@given(
    order=st.permutations(range(30)),
    runs=st.lists(st.integers(1, 30), max_size=2),
    num_threads=st.integers(1, 4),
    rows_per_shard=st.sampled_from([7, 16, 30]),
)
def test_a_row_depends_on_image_bytes_and_spec_alone(encoded_dataset, order, runs, num_threads, rows_per_shard):
    """Permute the image ids, and vary batches, shards and the number of runs."""
    reference = FeatureStore(encoded_dataset.out).grids(range(30))
    records = [replace(record, image_id=order[record.image_id]) for record in encoded_dataset.records()]
    work = Path(tempfile.mkdtemp(dir=encoded_dataset.folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "ROWS_PER_SHARD", rows_per_shard)
        for count in [*runs, 30]:
            with encode(
                records[:count], encoded_dataset.image_dir, encoded_dataset.params, work, CPU, num_threads
            ) as result:
                pass

    grids = FeatureStore(result.store).grids([order[image_id] for image_id in range(30)])
    assert np.array_equal(grids, reference)


@pytest.mark.slow
def test_views_are_rows_of_the_same_image(make):
    dataset = make(20)
    whole = dataset.encode()
    before = FeatureStore(dataset.out).grids(range(20))
    views = ("whole", "whole_flipped", "top_left")

    more = dataset.encode(views=views)
    store = FeatureStore(dataset.out)

    assert whole.counts.encoded == more.counts.encoded == 20
    assert more.metrics["bytes_per_image"] == 3 * whole.metrics["bytes_per_image"]
    assert store.views == views
    assert np.array_equal(store.grids(range(20), [0] * 20), before)
    pixels = read_views(dataset.image_dir / "0007.jpg", Frame(height=32, width=32), views)
    for i in range(3):
        expected = encode_grids(load_encoder(dataset.params), pixels[i][None])[0].astype(float)
        np.testing.assert_allclose(store.grids([7], [i])[0].astype(float), expected, atol=2e-3, rtol=2e-3)
    # The rows of the whole images are reused.
    assert len(list(dataset.out.glob("shard-*.h5"))) == 2
    assert dataset.encode(views=("top_left",)).counts == EncodeCounts(
        encoded=0, reused=20, removed=40, skipped=0, failed=0
    )


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system that is full after one shard, although it has free space: it has no more room for names."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=7", "tmpfs", mount], capture_output=True
    ).returncode:
        pytest.skip("this user cannot mount a small file system")
    yield mount
    subprocess.run(["umount", mount], check=True)


@pytest.mark.slow
def test_finished_shards_are_kept_when_the_disk_is_full(make, small_disk):
    dataset = make(2 * ROWS_PER_SHARD)
    dataset.encode(work="uninterrupted", out="uninterrupted-features")
    command = dataset.command(work="small/work")

    full = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert full.returncode == 2
    assert re.search(r"error: .*: cannot be written \(No space left on device\)\.", full.stderr)
    assert "Traceback" not in full.stderr
    assert not dataset.out.exists()
    assert not (dataset.folder / "metrics.json").exists()
    subprocess.run(["mount", "-o", "remount,nr_inodes=100", small_disk], check=True)
    resumed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"encode: {ROWS_PER_SHARD} encoded, {ROWS_PER_SHARD} reused" in resumed.stderr
    assert read_files(dataset.out) == read_files(dataset.folder / "uninterrupted-features")


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real photographs in ../shared/real")
def test_real_photographs_have_different_features(tmp_path):
    (tmp_path / "images").mkdir()
    for image_id, path in enumerate(sorted((REAL / "flickr" / "images").glob("*.jpg"))[:12]):
        (tmp_path / "images" / f"{image_id}.jpg").symlink_to(path)
    params = encode_params(REAL / "weights" / "resnet18-imagenet-to-layer3.pth", image_size=224)
    Dataset(tmp_path, params).encode()

    grids = FeatureStore(tmp_path / "features").grids(range(12)).astype(np.float32)

    assert grids.shape == (12, 196, 256)
    assert (grids >= 0).all()
    means = grids.mean(1)
    correlation = np.corrcoef(means - means.mean(0))
    assert (correlation - np.eye(12)).max() < 0.95


def test_grids_may_be_pooled_and_need_not_be_square(tmp_path, weights):
    dataset = make_dataset(tmp_path, weights, 3)
    image_size = ImageSize(height=96, width=160)
    frame = encoder_frame("resnet18", 96, 160, "center_crop")

    plain = dataset.encode(out="plain", image_size=image_size, resize="center_crop")
    pooled = dataset.encode(out="pooled", image_size=image_size, resize="center_crop", pool=GridSize(height=2, width=5))

    network = load_encoder(dataset.params)
    pixels = np.concatenate([read_views(path, frame, ("whole",)) for path in sorted(dataset.image_dir.iterdir())])
    expected = encode_grids(network, pixels).astype(np.float32).reshape(3, 6, 10, -1)
    grids, pooled_grids = (
        FeatureStore(tmp_path / name).grids(range(3)).astype(np.float32).reshape(3, *result.spec.grid, -1)
        for name, result in (("plain", plain), ("pooled", pooled))
    )
    np.testing.assert_allclose(grids, expected, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(pooled_grids, expected.reshape(3, 2, 3, 5, 2, -1).mean((2, 4)), rtol=2e-2, atol=2e-2)
    assert (plain.spec.pool, pooled.spec.pool) == (None, (2, 5))
    assert pooled.metrics["bytes_per_image"] == 2 * 5 * 256 * 2


def test_the_size_is_logged_before_anything_is_encoded(tmp_path, weights, caplog):
    dataset = make_dataset(tmp_path, weights, 3)

    with caplog.at_level("INFO", "gridcap"):
        dataset.encode()

    assert "encode: 2,048 bytes per image, 6,144 bytes in all" in caplog.messages


@pytest.mark.parametrize(("free", "in_cache"), [(6143, False), (12287, True)])
def test_a_disk_without_space_for_the_grids_is_an_error(tmp_path, weights, monkeypatch, free, in_cache):
    dataset = make_dataset(tmp_path, weights, 3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    monkeypatch.setattr(encoding, "copying_cache", lambda _: tmp_path if in_cache else None)

    with (
        pytest.raises(UserError) as error,
        encode(dataset.records(), dataset.image_dir, dataset.params, tmp_path / "work", CPU, 2, published=dataset.out),
    ):
        pass

    assert f"the grids need {free + 1:,} bytes" in str(error.value)
    assert ("DVC cache included" in str(error.value)) == in_cache
    assert f"{free:,} bytes are free" in str(error.value)
    assert not list((tmp_path / "work").rglob("shard-*"))
