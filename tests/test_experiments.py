"""Experiments in temporary workspaces of DVC, on datasets that git does not have."""

import json
import shutil
from pathlib import Path

import pytest

from tests.dvc_repository import Repository

pytestmark = pytest.mark.slow


@pytest.fixture
def clone(repository: Repository, tmp_path: Path) -> Repository:
    """A clone that shares the cache of the repository."""
    clone = repository.clone(tmp_path / "clone")
    clone.dvc("config", "--local", "cache.dir", str(repository.folder / ".dvc/cache"))
    return clone


@pytest.mark.exhaustive
def test_a_grid_search_runs_on_two_workers_with_a_dataset_outside_of_the_repository(
    repository: Repository, clone: Repository
) -> None:
    outside = clone.folder.parent / "datasets/scenes"
    shutil.copytree(repository.folder / "data/scenes/rendered", outside)
    shutil.copy(clone.folder / "data/scenes/encoder.safetensors", outside)
    clone.edit("params.yaml", dataset={"root": "../datasets/scenes"})
    clone.edit("params.yaml", encode={"weights": "../datasets/scenes/encoder.safetensors"})
    clone.repro()
    assert clone.encode_counts() == [(0, 39)]
    clone.commit()

    # As in docs/experiments.md.
    experiments = clone.folder / ".dvc/tmp/exps"
    experiments.mkdir(parents=True, exist_ok=True)
    (experiments / "datasets").symlink_to(outside.parent)
    clone.dvc("exp", "run", "--queue", "-S", "generate.search.beam_size=1,3", "-S", "generate.search.max_length=8")
    clone.run_queue(num_workers=2)

    assert clone.encode_counts() == [(0, 39)]
    shown = json.loads(clone.dvc("exp", "show", "--json"))
    experiments = [revision["experiments"] for revision in shown if revision["experiments"]]
    assert [len(rows) for rows in experiments] == [2]


@pytest.mark.exhaustive
def test_a_temporary_workspace_has_a_dataset_that_dvc_tracks(repository: Repository, clone: Repository) -> None:
    shutil.copytree(repository.folder / "data/scenes/rendered", clone.folder / "data/mine")
    clone.dvc("add", "data/mine")
    clone.edit("params.yaml", dataset={"root": "data/mine"})
    clone.commit()

    output = clone.dvc("exp", "run", "--temp", "-S", "train.max_epochs=1")

    assert "Ran experiment(s)" in output
    assert clone.encode_counts() == [(0, 39)]
    assert len(list((clone.folder / "data/.work/train").glob("*/"))) == 1
