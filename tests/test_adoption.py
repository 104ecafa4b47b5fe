"""Adoption of grids from DVC's cache: a team's repository with the stage `encode`, run by DVC itself."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

from pipeline.captions.records import Record, write_records
from pipeline.features.adoption import adopt_shards, copying_cache
from pipeline.features.store import FeatureStore
from pipeline.params import to_plain
from tests.command_line import git
from tests.dvc_repository import Repository
from tests.factories import encode_params, small_spec
from tests.feature_stores import write_store
from tests.image_files import encode_jpeg
from tests.paths import ROOT

COMMAND = (
    "python -m stages.encode_images --params params.yaml --prepared prepared --out data/features --work data/.work"
    " --metrics metrics.json --device cpu --num-threads 1"
)
STAGE = {
    "cmd": COMMAND,
    "deps": ["prepared", "images"],
    "params": ["encode"],
    "outs": ["data/features"],
    "metrics": [{"metrics.json": {"cache": False}}],
}


class Clone(Repository):
    """A clone of the team's repository."""

    def write_images(self, image_ids: range, version: int = 0) -> None:
        """Write a JPEG of random colors for each id, and the records of all images."""
        for image_id in image_ids:
            rng = np.random.default_rng([image_id, version])
            image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((40, 32))
            (self.folder / "images" / f"{image_id}.jpg").write_bytes(encode_jpeg(image))
        records = [
            Record(image_id=int(path.stem), file=path.name, split="train", captions=("an image",))
            for path in sorted((self.folder / "images").iterdir())
        ]
        write_records(self.folder / "prepared", records)

    def set(self, **values: object) -> None:
        """Set params of `encode`."""
        path = self.folder / "params.yaml"
        params = json.loads(path.read_text())
        params["encode"] |= values
        path.write_text(json.dumps(params))

    def cached_shards(self) -> list[Path]:
        """Return the shards in DVC's cache."""
        objects = (self.folder / ".dvc/cache/files/md5").rglob("*")
        return [path for path in objects if path.is_file() and path.read_bytes().startswith(b"\x89HDF")]


@pytest.fixture(scope="module", autouse=True)
def source_path() -> Iterator[None]:
    """Let the stage import this project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A repository that has encoded 20 images, with a remote to which they are pushed."""
    folder = tmp_path_factory.mktemp("team")
    weights = folder / "resnet18.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(torchvision.models.resnet18(weights=None).state_dict(), weights)
    clone = Clone(folder / "first")
    (clone.folder / "images").mkdir(parents=True)
    clone.write_images(range(20))
    params = {
        "dataset": {"root": ".", "images": "images", "bad_images": "error"},
        "encode": to_plain(encode_params(weights)),
    }
    (clone.folder / "params.yaml").write_text(json.dumps(params))
    with (clone.folder / "dvc.yaml").open("w") as file:
        YAML().dump({"stages": {"encode": STAGE}}, file)
    (clone.folder / ".gitignore").write_text("/data/.work\n")
    git(clone.folder, "init", "--quiet")
    clone.dvc("init", "--quiet")
    clone.dvc("config", "cache.type", "reflink,hardlink,copy")
    clone.dvc("remote", "add", "--default", "shared", str(folder / "remote"))
    clone.dvc("repro")
    assert clone.encode_counts() == [(20, 0)]
    clone.commit()
    clone.dvc("push")
    return clone


@pytest.fixture
def clone(team: Clone, tmp_path: Path) -> Clone:
    """A new clone, without DVC's cache."""
    return team.clone(tmp_path / "clone")


@pytest.mark.slow
def test_after_a_pull_only_new_and_edited_images_are_encoded(team: Clone, clone: Clone) -> None:
    clone.dvc("pull")

    clone.write_images(range(20, 25))
    clone.dvc("repro")
    clone.commit()
    clone.write_images(range(3, 4), version=1)
    clone.dvc("repro")
    assert clone.encode_counts() == [(5, 20), (1, 24)]

    original, store = FeatureStore(team.folder / "data/features"), FeatureStore(clone.folder / "data/features")
    assert store.verify() == 3
    unedited = [image_id for image_id in range(20) if image_id != 3]
    assert np.array_equal(store.grids(unedited), original.grids(unedited))
    assert not np.array_equal(store.grid(3), original.grid(3))
    assert "up to date" in clone.dvc("status")


@pytest.mark.slow
def test_make_clean_costs_nothing_that_dvc_has(clone: Clone) -> None:
    clone.dvc("pull")
    for layer in ("layer2", "layer3"):  # layer2 is never committed, so that only the run cache names it
        clone.set(layer=layer)
        clone.dvc("repro")
    shutil.rmtree(clone.folder / "data/.work")

    clone.write_images(range(20, 22))
    clone.dvc("repro")
    shutil.rmtree(clone.folder / "data/.work")
    clone.set(layer="layer2")
    clone.dvc("repro")

    assert clone.encode_counts() == [(2, 20)]
    assert len(clone.cached_shards()) == 4
    assert FeatureStore(clone.folder / "data/features").verify() == 2
    clone.dvc("gc", "--workspace", "--force")
    assert len(clone.cached_shards()) == 2
    assert FeatureStore(clone.folder / "data/features").verify() == 2


@pytest.mark.slow
@pytest.mark.parametrize("position", [49_400, 20_000], ids=["keys", "grids"])
@pytest.mark.exhaustive
def test_a_damaged_file_in_the_cache_is_replaced(clone: Clone, position: int) -> None:
    clone.dvc("pull")
    (shard,) = clone.cached_shards()
    content = shard.read_bytes()
    shard.chmod(0o644)
    shard.write_bytes(content[:position] + bytes(500) + content[position + 500 :])
    shard.chmod(0o444)  # DVC trusts files that nobody may write to

    output = clone.dvc("repro", "--force", "--single-item", "encode")

    assert f"{shard}: " in output
    assert "damaged. Its images are encoded again" in output
    assert clone.encode_counts() == [(20, 0)]
    assert FeatureStore(clone.folder / "data/features").verify() == 1
    assert [path.read_bytes() for path in clone.cached_shards()] == [content]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_another_spec_and_an_unchanged_dataset_adopt_nothing(clone: Clone) -> None:
    clone.dvc("pull")
    assert clone.repro() == []

    clone.set(image_size=64)
    clone.dvc("repro")

    assert clone.encode_counts() == [(20, 0)]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_without_the_cache_a_message_names_the_fetch(clone: Clone) -> None:
    clone.write_images(range(20, 21))
    output = clone.dvc("repro")
    assert "data/features: DVC's cache lacks files of the version in dvc.lock" in output
    assert "`dvc fetch encode`" in output
    assert clone.encode_counts() == [(21, 0)]

    git(clone.folder, "checkout", "dvc.lock")
    shutil.rmtree(clone.folder / "data/.work")
    clone.dvc("fetch", "encode")
    clone.write_images(range(21, 22))
    assert "dvc fetch" not in clone.dvc("repro")
    assert clone.encode_counts() == [(1, 21)]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_experiments_share_grids_with_each_other_and_with_the_repository(clone: Clone) -> None:
    clone.dvc("pull")
    for views in ("[whole,center]", "[whole,top_left]"):
        clone.dvc("exp", "run", "--queue", "-S", f"encode.views={views}")
    clone.run_queue(num_workers=2)
    assert clone.encode_counts() == [(20, 0), (20, 0)]

    clone.set(views=["center", "top_left"])
    clone.dvc("repro")
    assert clone.encode_counts()[2:] == [(0, 20)]


def test_adoption_without_a_repository_reads_the_published_store(tmp_path: Path) -> None:
    spec = small_spec()
    grids = np.arange(24, dtype=np.float16).reshape(2, 4, 3)
    write_store(tmp_path / "features", spec, [0, 1], grids)
    missing = {(f"{1:064x}", "whole"), (f"{2:064x}", "whole")}
    (tmp_path / "work").mkdir()

    assert adopt_shards(tmp_path / "work", small_spec(layer="layer4"), missing, tmp_path / "features") == []
    assert adopt_shards(tmp_path / "work", spec, {(f"{2:064x}", "whole")}, tmp_path / "features") == []
    (shard,) = adopt_shards(tmp_path / "work", spec, missing, tmp_path / "features")

    assert shard.path.read_bytes() == (tmp_path / "features" / shard.path.name).read_bytes()
    assert [digest for digest, _ in shard.keys] == [f"{0:064x}", f"{1:064x}"]


@pytest.mark.parametrize(("cache_type", "copies"), [("copy", True), ("hardlink,copy", False)])
def test_a_cache_that_dvc_copies_is_found(tmp_path, cache_type, copies):
    for command in (["init", "--no-scm"], ["config", "cache.type", cache_type]):
        subprocess.run([sys.executable, "-m", "dvc", "--quiet", *command], cwd=tmp_path, check=True)

    cache = copying_cache(tmp_path / "data/features")

    assert cache == (tmp_path / ".dvc/cache/files/md5" if copies else None)
    assert copying_cache(tmp_path.parent / "elsewhere") is None
