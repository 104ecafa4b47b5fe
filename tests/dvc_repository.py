"""A small copy of the project, with git and DVC set up, and clones of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path
from typing import Self

from dvc.repo import Repo, lock_repo
from ruamel.yaml import YAML

from pipeline.presets import use
from tests.command_line import git
from tests.paths import ROOT

SOURCES = ["gridcap.py", "pipeline", "stages", "presets", "data/weights", "data/ensemble", "dvc.yaml", "params.yaml"]
SOURCES += ["None", ".dvcignore", ".dvc/config"]
SOURCES += [f"data/scenes/{name}" for name in ("dvc.yaml", "params.yaml", "encoder.json")]
SOURCES += ["data/scenes/encoder.safetensors"]
STAGES = ["data/scenes/dvc.yaml:render", "prepare", "tokenize", "encode", "train", "refine", "generate", "evaluate"]


class Repository:
    """A repository of git and DVC."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def copy_project(cls, folder: Path) -> Self:
        """Copy the project, with a smaller dataset and model, and commit it."""
        repository = cls(folder)
        for name in SOURCES:
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        # params.yaml of the working tree may select another dataset.
        use(ROOT / "presets/scenes.yaml", [], folder / "params.yaml")
        repository.edit("data/scenes/params.yaml", render={"num_train": 24, "num_val": 6, "num_test": 9})
        decoder = {
            "kind": "soft_attention",
            "embedding_size": 16,
            "hidden_size": 16,
            "attention_size": 16,
            "non_local_size": 0,
            "dropout": 0.1,
        }
        decoder |= {"region_dropout": 0.0, "word_dropout": 0.1}
        evaluate = {"meteor": False, "bootstrap_samples": 100, "attention_plots": 1}
        repository.edit("params.yaml", train={"max_epochs": 3, "decoder": decoder}, evaluate=evaluate)
        (folder / ".gitignore").write_text("/data/.work\n/results/live\n/results/live_refine\n")
        git(folder, "init", "--quiet")
        repository.commit()
        return repository

    def clone(self, folder: Path) -> Self:
        """Clone the repository with git, without DVC's cache."""
        git(self.folder, "clone", "--quiet", str(self.folder), str(folder))
        return type(self)(folder)

    def commit(self) -> None:
        """Commit all files that git does not ignore."""
        git(self.folder, "add", ".")
        git(self.folder, "commit", "--quiet", "--message", "A change")

    def edit(self, file: str, **sections: dict[str, object]) -> None:
        yaml = YAML()
        document = yaml.load(self.folder / file)
        for section, values in sections.items():
            document[section].update(values)
        yaml.dump(document, self.folder / file)

    def start(self, *words: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.Popen(
            [sys.executable, "-m", "dvc", *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def dvc(self, *words: str) -> str:
        with self.start(*words) as process:
            output = process.communicate()[0]
        assert process.returncode == 0, output
        return output

    def dvc_fails(self, *words: str) -> str:
        with self.start(*words) as process:
            output = process.communicate()[0]
        assert process.returncode != 0, output
        return output

    def repro(self) -> list[str]:
        """Run `dvc repro` and return the stages that ran."""
        return re.findall(r"Running stage '([^']+)'", self.dvc("repro"))

    def run_queue(self, num_workers: int) -> None:
        """Run the queued experiments, which must succeed."""
        self.dvc("queue", "start", "--jobs", str(num_workers))
        while {"Queued", "Running"} & {status for _, status in self.queue()}:
            time.sleep(1)
        for task, status in self.queue():
            assert status == "Success", self.dvc("queue", "logs", task)

    def queue(self) -> list[tuple[str, str]]:
        """Return the id and the status of each experiment that was queued."""
        return re.findall(r"(?m)^([0-9a-f]{7}) .* (Queued|Running|Success|Failed) *$", self.dvc("queue", "status"))

    def changed(self) -> list[str]:
        """Return the stages whose dependencies have changed, as `dvc status` does."""
        with chdir(self.folder), Repo() as repo, lock_repo(repo):
            return sorted(repo.status())

    def encode_counts(self) -> list[tuple[int, int]]:
        """Return the numbers of encoded and reused images of each run of `encode` in this clone."""
        lines = (self.folder / "data/.work/encode/runs.jsonl").read_text().splitlines()
        return [(run["encoded"], run["reused"]) for run in map(json.loads, lines)]

    def locks(self) -> dict[str, str]:
        return {name: (self.folder / name).read_text() for name in ("dvc.lock", "data/scenes/dvc.lock")}
