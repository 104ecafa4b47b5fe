import contextlib
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

from pipeline.captions.records import Record, write_records
from pipeline.errors import UserError
from pipeline.features import encoding
from pipeline.features.encoder import EncodeParams, encode_grids, load_encoder
from pipeline.features.encoding import ROWS_PER_SHARD, RUNS_FILE, Counts, Encoded, encode
from pipeline.features.images import read_image, read_views
from pipeline.features.quantization.quantized_encoder import multiplies_exactly
from pipeline.features.store import INDEX_FILE, FeatureStore, intact_shards
from tests.factories import encode_params

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "real"


def paint(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    coarse.resize((40, 32), Image.Resampling.BICUBIC).save(path, quality=90)


@dataclass(frozen=True)
class Dataset:
    """Pictures, weights and params in a folder, and the runs over them."""

    folder: Path
    params: EncodeParams

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def out(self) -> Path:
        return self.folder / "features"

    def records(self) -> list[Record]:
        """One for each file, whose name is its id."""
        return [
            Record(image_id=int(path.stem), file=path.name, split="train", captions=("a picture",))
            for path in sorted(self.images.iterdir())
        ]

    def encode(self, work: str = "work", out: str = "features", threads: int = 2, **params: object) -> Encoded:
        return encode(
            self.records(),
            self.images,
            EncodeParams(**(vars(self.params) | params)),
            self.folder / work,
            self.folder / out,
            torch.device("cpu"),
            threads,
        )

    def stage(self, work: str = "work", out: str = "features") -> list[str]:
        """The command line of the real stage over the dataset."""
        write_records(self.folder / "prepared", self.records())
        values = "".join(f"  {name}: {json.dumps(value)}\n" for name, value in vars(self.params).items())
        (self.folder / "params.yaml").write_text("encode:\n" + values)
        flags = {
            "params": "params.yaml",
            "prepared": "prepared",
            "images": "images",
            "out": out,
            "work": work,
        }
        paths = [f"--{name}={self.folder / path}" for name, path in flags.items()]
        metrics = f"--metrics={self.folder / 'metrics.json'}"
        return [sys.executable, "-m", "stages.encode_images", *paths, metrics, "--device=cpu", "--threads=2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


def dataset_in(folder: Path, weights: Path, pictures: int) -> Dataset:
    (folder / "images").mkdir()
    for image_id in range(pictures):
        paint(folder / "images" / f"{image_id:04}.jpg", image_id)
    return Dataset(folder, encode_params(weights))


@pytest.fixture
def make(tmp_path, weights) -> Callable[[int], Dataset]:
    return lambda pictures: dataset_in(tmp_path, weights, pictures)


@pytest.fixture(scope="module")
def thirty(tmp_path_factory, weights) -> Dataset:
    """Thirty pictures, encoded."""
    dataset = dataset_in(tmp_path_factory.mktemp("thirty"), weights, 30)
    dataset.encode()
    return dataset


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_image_gets_its_grid(make):
    dataset = make(20)

    result = dataset.encode()

    assert result.counts == Counts(encoded=20, reused=0, removed=0, failed=0)
    assert result.figures == {
        "images": 20,
        "views": 1,
        "shards": 1,
        "grid_height": 2,
        "grid_width": 2,
        "channels": 256,
        "bytes_an_image": 2048,
    }
    store, encoder = FeatureStore(dataset.out), load_encoder(dataset.params)
    assert store.image_ids == tuple(range(20))
    for image_id in (0, 7, 19):
        picture = read_image(dataset.images / f"{image_id:04}.jpg", 32)[None]
        expected = encode_grids(encoder, picture)[0].astype(float)
        np.testing.assert_allclose(store.grid(image_id).astype(float), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    "precision",
    [
        "float32",
        "bfloat16",
        pytest.param("int8", marks=pytest.mark.skipif(not multiplies_exactly(), reason="this processor has no VNNI")),
    ],
)
def test_a_row_depends_on_the_image_alone(make, precision):
    dataset = make(37)
    dataset.encode(precision=precision)
    grids = FeatureStore(dataset.out).grids(range(37))
    cores = torch.get_num_threads()

    for path in sorted(dataset.images.iterdir()):
        path.rename(path.with_name(f"{5000 - int(path.stem) * 7 % 37}.jpg"))
    for image_id in (1, 5005, 5010):
        paint(dataset.images / f"{image_id}.jpg", 100 + image_id)
    torch.set_num_threads(1)
    try:
        dataset.encode(work="elsewhere", threads=5, precision=precision)
    finally:
        torch.set_num_threads(cores)

    shuffled = FeatureStore(dataset.out).grids([5000 - image_id * 7 % 37 for image_id in range(37)])
    assert np.array_equal(shuffled, grids)


def test_new_threads_get_as_many_processors_as_before_whether_a_run_succeeds_or_not(make, tmp_path):
    def processors() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    dataset = make(40)
    before = torch.get_num_threads()

    dataset.encode()
    assert (torch.get_num_threads(), processors()) == (before, before)

    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer3.1.bn2.weight"] = torch.full((256,), 1e9)
    save_file(state, tmp_path / "huge.safetensors")
    with pytest.raises(UserError, match="beyond float16"):
        dataset.encode(weights=str(tmp_path / "huge.safetensors"))
    assert (torch.get_num_threads(), processors()) == (before, before)


def test_two_runs_publish_the_same_bytes(make):
    dataset = make(ROWS_PER_SHARD + 5)

    dataset.encode(out="one")
    dataset.encode(out="two", work="elsewhere")

    assert tree(dataset.folder / "one") == tree(dataset.folder / "two")
    assert len(list((dataset.folder / "one").glob("shard-*.h5"))) == 2


def test_a_second_run_encodes_nothing(make):
    dataset = make(20)
    dataset.encode()
    before = tree(dataset.out)
    shutil.rmtree(dataset.out)  # as DVC does before it runs a stage

    result = dataset.encode()

    assert result.counts == Counts(encoded=0, reused=20, removed=0, failed=0)
    assert tree(dataset.out) == before


def test_changes_of_the_dataset_cost_what_they_touch(make):
    dataset = make(20)
    dataset.encode()
    grids = FeatureStore(dataset.out).grids(range(20))

    paint(dataset.images / "0020.jpg", 20)
    added = dataset.encode()
    (dataset.images / "0003.jpg").rename(dataset.images / "0300.jpg")
    renamed = dataset.encode()
    paint(dataset.images / "0004.jpg", 44)
    edited = dataset.encode()
    (dataset.images / "0005.jpg").unlink()
    removed = dataset.encode()
    paint(dataset.images / "0004.jpg", 4)
    restored = dataset.encode()

    runs = [
        (run.counts.encoded, run.counts.reused, run.counts.removed)
        for run in (added, renamed, edited, removed, restored)
    ]
    assert runs == [(1, 20, 0), (0, 21, 0), (1, 20, 1), (0, 20, 2), (0, 20, 2)]
    store = FeatureStore(dataset.out)
    assert store.image_ids == (0, 1, 2, 4, *range(6, 21), 300)
    assert np.array_equal(store.grids([0, 300, 4, 19]), grids[[0, 3, 4, 19]])
    assert restored.shards == 2
    assert len(list(dataset.out.glob("shard-*.h5"))) == 2


def test_equal_files_share_a_row(make):
    dataset = make(5)
    shutil.copy(dataset.images / "0002.jpg", dataset.images / "0009.jpg")

    result = dataset.encode()

    assert (result.counts.encoded, result.counts.reused) == (5, 1)
    index = json.loads((dataset.out / INDEX_FILE).read_text())
    assert index["images"]["2"] == index["images"]["9"]
    assert index["shards"][0]["rows"] == 5


def test_each_setting_has_its_own_rows_and_equal_weights_share_them(make, weights, tmp_path):
    dataset = make(5)
    first = dataset.encode()
    smaller = dataset.encode(layer="layer2")
    other = tmp_path / "same-weights.safetensors"
    shutil.copy(weights, other)
    same = dataset.encode(weights=str(other))

    assert (smaller.counts.encoded, smaller.counts.reused) == (5, 0)
    assert smaller.spec.fingerprint != first.spec.fingerprint
    assert (same.counts.encoded, same.counts.reused) == (0, 5)
    with pytest.raises(UserError, match=f"{first.spec.fingerprint}, but {smaller.spec.fingerprint}"):
        FeatureStore(dataset.out, smaller.spec.fingerprint)


def test_a_truncated_shard_is_encoded_again(make):
    dataset = make(ROWS_PER_SHARD + 5)
    dataset.encode()
    before = tree(dataset.out)
    shard = min((dataset.folder / "work").rglob("shard-*.h5"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-7])

    result = dataset.encode()

    assert (result.counts.encoded, result.counts.reused) == (5, ROWS_PER_SHARD)
    assert tree(dataset.out) == before


@pytest.mark.parametrize("fault", ["unreadable", "missing"])
def test_bad_images_are_named_and_all_else_is_kept(make, fault):
    dataset = make(3 * ROWS_PER_SHARD)
    dataset.encode(work="undisturbed", out="undisturbed-features")
    records, bad = dataset.records(), [dataset.images / f"{number:04}.jpg" for number in (ROWS_PER_SHARD + 2, 200)]
    for path in bad:
        path.unlink()
        if fault == "unreadable":
            path.write_bytes(f"<html>{path}".encode())

    with pytest.raises(UserError, match=f"{bad[0]}: cannot be read.*{bad[1]}: cannot be read.*, 2 failed"):
        encode(
            records,
            dataset.images,
            dataset.params,
            dataset.folder / "work",
            dataset.out,
            torch.device("cpu"),
            2,
        )
    assert not dataset.out.exists()
    for path in bad:
        paint(path, int(path.stem))
    result = dataset.encode()

    assert (result.counts.encoded, result.counts.reused) == (ROWS_PER_SHARD, 2 * ROWS_PER_SHARD)
    assert tree(dataset.out) == tree(dataset.folder / "undisturbed-features")


def test_each_run_leaves_a_line_with_its_counts(make):
    dataset = make(20)
    dataset.encode()
    paint(dataset.images / "0020.jpg", 20)
    dataset.encode()

    lines = (dataset.folder / "work" / "encode" / RUNS_FILE).read_text().splitlines()

    runs = [json.loads(line) for line in lines]
    assert [(run["encoded"], run["reused"], run["removed"], run["failed"]) for run in runs] == [
        (20, 0, 0, 0),
        (1, 20, 0, 0),
    ]
    assert runs[0].keys() >= {"ended", "fingerprint", "seconds", "processes"}


def test_killed_at_twenty_moments_the_stage_goes_on_to_the_same_bytes(make):
    dataset = make(3 * ROWS_PER_SHARD + 9)
    undisturbed = dataset.encode(work="undisturbed", out="undisturbed-features")
    command, work = dataset.stage(), dataset.folder / "work" / "encode"
    rng = random.Random(20)

    def finished() -> dict[str, int]:
        return {path.stem: path.stat().st_ino for path in work.rglob("shard-*.sha256") if "published" not in str(path)}

    def kill_when(reached: Callable[[float], object]) -> None:
        began = time.monotonic()
        with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not reached(time.monotonic() - began):
                time.sleep(0.0005)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    began = time.monotonic()
    subprocess.run([*command, f"--work={dataset.folder / 'timed'}"], cwd=ROOT, check=True, capture_output=True)
    takes = time.monotonic() - began
    shutil.rmtree(dataset.out)
    moments: list[Callable[[float], object]] = [
        lambda _: any(work.rglob("*.h5.partial")),
        lambda _: any(work.rglob("published")) or any(dataset.folder.glob(".features.*")),
        *(partial(operator.lt, rng.uniform(0.3, 1) * takes) for _ in range(18)),
    ]
    rng.shuffle(moments)
    kept: dict[str, int] = {}
    for moment in moments:
        kill_when(moment)
        # What was finished before is there still, and was not written again.
        assert kept.items() <= finished().items()
        kept = finished()
    shutil.rmtree(dataset.out, ignore_errors=True)
    rows = sum(len(shard.keys) for folder in work.glob("*/") for shard in intact_shards(folder))
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    assert tree(dataset.out) == tree(dataset.folder / "undisturbed-features")
    assert json.loads((dataset.folder / "metrics.json").read_text()) == undisturbed.figures
    assert f"encode: {len(dataset.records()) - rows} encoded, {rows} reused, 0 removed, 0 failed" in result.stdout
    assert sorted(path.name for path in dataset.folder.glob(".*")) == []


def test_two_processes_make_the_bytes_of_one_and_a_lost_ones_shards_are_taken_up(make):
    dataset = make(5 * ROWS_PER_SHARD + 3)
    dataset.encode(work="alone", out="features-alone")
    command = dataset.stage()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *command[1:]]
    work = dataset.folder / "work" / "encode"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    with subprocess.Popen(launch, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (found := rank_of(process.pid, 1)):
            time.sleep(0.01)
        while process.poll() is None and not any(work.rglob("shard-*.sha256")):
            time.sleep(0.001)
        os.kill(found, signal.SIGKILL)
        process.communicate()
    assert process.returncode != 0
    assert not dataset.out.exists()
    rows = sum(len(shard.keys) for folder in work.glob("*/") for shard in intact_shards(folder))
    assert ROWS_PER_SHARD <= rows < len(dataset.records())
    again = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True)

    assert again.returncode == 0, again.stderr
    assert again.stdout.count(f"encode: {len(dataset.records()) - rows} encoded, {rows} reused") == 1
    assert tree(dataset.out) == tree(dataset.folder / "features-alone")
    assert json.loads((work / RUNS_FILE).read_text())["processes"] == 2


def rank_of(launcher: int, rank: int) -> int:
    """Process id of a rank below a launcher, 0 before it runs."""
    for process in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank):
                return process.pid
    return 0


@settings(max_examples=8, deadline=None)
@given(
    order=st.permutations(range(30)),
    runs=st.lists(st.integers(1, 30), max_size=2),
    threads=st.integers(1, 4),
    rows=st.sampled_from([7, 16, 30]),
)
def test_a_row_depends_on_the_bytes_and_the_setting_alone(thirty, order, runs, threads, rows):
    """Images get other ids, neighbors and shards, and come in several runs."""
    reference = FeatureStore(thirty.out).grids(range(30))
    records = [replace(record, image_id=order[record.image_id]) for record in thirty.records()]
    work = Path(tempfile.mkdtemp(dir=thirty.folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "ROWS_A_SHARD", rows)
        for count in [*runs, 30]:
            encode(records[:count], thirty.images, thirty.params, work, work / "out", torch.device("cpu"), threads)

    grids = FeatureStore(work / "out").grids([order[image_id] for image_id in range(30)])
    assert np.array_equal(grids, reference)


def test_views_are_rows_of_the_same_image(make):
    dataset = make(20)
    whole = dataset.encode()
    before = FeatureStore(dataset.out).grids(range(20))
    views = ("whole", "whole_flipped", "top_left")

    more = dataset.encode(views=views)
    store = FeatureStore(dataset.out)

    assert whole.counts.encoded == more.counts.encoded == 20
    assert more.figures["bytes_an_image"] == 3 * whole.figures["bytes_an_image"]
    assert store.views == views
    assert np.array_equal(store.grids(range(20), [0] * 20), before)
    picture = read_views(dataset.images / "0007.jpg", 32, views)
    for place in range(3):
        expected = encode_grids(load_encoder(dataset.params), picture[place][None])[0].astype(float)
        np.testing.assert_allclose(store.grids([7], [place])[0].astype(float), expected, atol=2e-3, rtol=2e-3)
    # The rows of the whole pictures are those that were there.
    assert len(list(dataset.out.glob("shard-*.h5"))) == 2
    assert dataset.encode(views=("top_left",)).counts == Counts(encoded=0, reused=20, removed=40, failed=0)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system with room for one shard and a half."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=420k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_a_full_disk_is_told_and_finished_shards_are_kept(make, small_disk):
    dataset = make(2 * ROWS_PER_SHARD)
    dataset.encode(work="undisturbed", out="undisturbed-features")
    command = dataset.stage(work="small/work")

    full = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert full.returncode == 2
    assert re.search(r"error: .* cannot be written \(No space left on device\); free space and run again", full.stderr)
    assert "Traceback" not in full.stderr
    assert not dataset.out.exists()
    assert not (dataset.folder / "metrics.json").exists()
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"encode: {ROWS_PER_SHARD} encoded, {ROWS_PER_SHARD} reused" in again.stdout
    assert tree(dataset.out) == tree(dataset.folder / "undisturbed-features")


def test_memory_does_not_grow_with_the_number_of_images(make):
    dataset = make(12)
    peaks = []
    for copies in (20, 120):
        for number in range(12 * copies):
            file = (dataset.images / f"{number % 12:04}.jpg").read_bytes()
            # Behind the end of a JPEG nothing is read, but the digest is another one.
            (dataset.images / f"{number:04}.jpg").write_bytes(file + number.to_bytes(4))
        script = (
            "import resource, runpy, sys; sys.argv = sys.argv[1:];"
            "print = __builtins__.print\n"
            "try: runpy.run_module('stages.encode_images', run_name='__main__')\n"
            "except SystemExit as end: assert not end.code\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", script, *dataset.stage(work=f"work{copies}")[2:]]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert f"{12 * copies} encoded" in result.stdout
        peaks.append(int(result.stdout.split()[-1]))

    assert peaks[1] - peaks[0] < 40_000, "KiB for 1,200 images more"
    assert peaks[1] < 2_000_000


@pytest.mark.skipif(not REAL.is_dir(), reason="the real photographs of ../shared/real are absent")
def test_real_photographs_go_through_real_weights(tmp_path):
    (tmp_path / "images").mkdir()
    for image_id, path in enumerate(sorted((REAL / "flickr" / "images").glob("*.jpg"))[:12]):
        (tmp_path / "images" / f"{image_id}.jpg").symlink_to(path)
    params = encode_params(REAL / "weights" / "resnet18-imagenet-to-layer3.pth", image_size=224)
    Dataset(tmp_path, params).encode()

    grids = FeatureStore(tmp_path / "features").grids(range(12)).astype(np.float32)

    assert grids.shape == (12, 196, 256)
    assert (grids >= 0).all()
    means = grids.mean(1)
    likeness = np.corrcoef(means - means.mean(0))
    assert (likeness - np.eye(12)).max() < 0.95
