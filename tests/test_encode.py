import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from pipeline.captions.records import Record, write_records
from pipeline.errors import UserError
from pipeline.features.encoder import EncodeParams, encode_grids, load_encoder
from pipeline.features.encoding import IMAGES_A_SHARD, Encoded, encode
from pipeline.features.images import read_image
from pipeline.features.store import INDEX_FILE, FeatureStore

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
        values = "".join(f"  {name}: {value}\n" for name, value in vars(self.params).items())
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


@pytest.fixture
def make(tmp_path, weights) -> Callable[[int], Dataset]:
    def dataset(pictures: int) -> Dataset:
        (tmp_path / "images").mkdir()
        for image_id in range(pictures):
            paint(tmp_path / "images" / f"{image_id:04}.jpg", image_id)
        params = EncodeParams(
            architecture="resnet18",
            layer="layer3",
            weights=str(weights),
            watch="data",
            image_size=32,
            precision="float32",
        )
        return Dataset(tmp_path, params)

    return dataset


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_image_gets_its_grid(make):
    dataset = make(20)

    result = dataset.encode()

    assert (result.encoded, result.reused, result.removed) == (20, 0, 0)
    assert result.figures == {
        "images": 20,
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
        expected = encode_grids(encoder, picture, "float32")[0].astype(float)
        np.testing.assert_allclose(store.grid(image_id).astype(float), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
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


def test_two_runs_publish_the_same_bytes(make):
    dataset = make(IMAGES_A_SHARD + 5)

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

    assert (result.encoded, result.reused, result.removed) == (0, 20, 0)
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

    runs = [(run.encoded, run.reused, run.removed) for run in (added, renamed, edited, removed, restored)]
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

    assert (result.encoded, result.reused) == (5, 1)
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

    assert (smaller.encoded, smaller.reused) == (5, 0)
    assert smaller.setting.fingerprint != first.setting.fingerprint
    assert (same.encoded, same.reused) == (0, 5)
    with pytest.raises(UserError, match=f"{first.setting.fingerprint}, but {smaller.setting.fingerprint}"):
        FeatureStore(dataset.out, smaller.setting.fingerprint)


def test_a_truncated_shard_is_encoded_again(make):
    dataset = make(IMAGES_A_SHARD + 5)
    dataset.encode()
    before = tree(dataset.out)
    shard = min((dataset.folder / "work").rglob("shard-*.h5"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-7])

    result = dataset.encode()

    assert (result.encoded, result.reused) == (5, IMAGES_A_SHARD)
    assert tree(dataset.out) == before


@pytest.mark.parametrize("fault", ["unreadable", "missing"])
def test_a_bad_image_is_named_after_finished_shards_are_kept(make, fault):
    dataset = make(IMAGES_A_SHARD + 5)
    records, bad = dataset.records(), dataset.images / f"{IMAGES_A_SHARD + 2:04}.jpg"
    bad.unlink()
    if fault == "unreadable":
        bad.write_bytes(b"<html>")

    with pytest.raises(UserError, match=f"{bad}: cannot be read"):
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
    paint(bad, IMAGES_A_SHARD + 2)
    result = dataset.encode()

    assert (result.encoded, result.reused) == (5, IMAGES_A_SHARD)


def test_killed_at_any_moment_the_stage_goes_on_to_the_same_bytes(make):
    dataset = make(3 * IMAGES_A_SHARD + 9)
    undisturbed = dataset.encode(work="undisturbed", out="undisturbed-features")
    command, work = dataset.stage(), dataset.folder / "work" / "encode"

    def kill_when(shown: Callable[[], object]) -> bool:
        with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not shown():
                time.sleep(0.0005)
            if alive := process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return alive

    kills = [
        kill_when(lambda: any(work.rglob("*.h5.partial")) or any(work.rglob("shard-*.h5"))),
        kill_when(lambda: len(list(work.rglob("shard-*.sha256"))) >= 2),
        kill_when(lambda: any(work.rglob("published")) or any(dataset.folder.glob(".features.*"))),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert any(kills)
    assert result.returncode == 0, result.stderr
    assert tree(dataset.out) == tree(dataset.folder / "undisturbed-features")
    assert json.loads((dataset.folder / "metrics.json").read_text()) == undisturbed.figures
    reused = int(result.stdout.split(" encoded, ")[1].split(" reused")[0])
    assert reused >= IMAGES_A_SHARD
    assert sorted(path.name for path in dataset.folder.glob(".*")) == []


def test_a_disk_without_room_is_told_and_nothing_is_published(make):
    dataset = make(IMAGES_A_SHARD)

    def small_files() -> None:
        # Unlike a full disk, a limit needs no privilege; the stage meets both in the same place.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = subprocess.run(dataset.stage(), cwd=ROOT, capture_output=True, text=True, preexec_fn=small_files)

    assert result.returncode == 2
    assert "error: " in result.stderr
    assert "cannot be written (File too large); free space and run again" in result.stderr
    assert "Traceback" not in result.stderr
    assert not dataset.out.exists()
    assert not (dataset.folder / "metrics.json").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real photographs of ../shared/real are absent")
def test_real_photographs_go_through_real_weights(tmp_path):
    (tmp_path / "images").mkdir()
    for image_id, path in enumerate(sorted((REAL / "flickr" / "images").glob("*.jpg"))[:12]):
        (tmp_path / "images" / f"{image_id}.jpg").symlink_to(path)
    params = EncodeParams(
        architecture="resnet18",
        layer="layer3",
        weights=str(REAL / "weights" / "resnet18-imagenet-to-layer3.pth"),
        watch="data",
        image_size=224,
        precision="float32",
    )
    Dataset(tmp_path, params).encode()

    grids = FeatureStore(tmp_path / "features").grids(range(12)).astype(np.float32)

    assert grids.shape == (12, 196, 256)
    assert (grids >= 0).all()
    means = grids.mean(1)
    likeness = np.corrcoef(means - means.mean(0))
    assert (likeness - np.eye(12)).max() < 0.95
