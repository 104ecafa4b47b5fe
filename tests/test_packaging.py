"""The wheel in an environment with only its requirements: no clone, no DVC, no dataset."""

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline.prediction.captioner import Captioner
from pipeline.prediction.export import export
from tests.paths import ROOT
from tests.tiny_captioner import Tiny

pytestmark = pytest.mark.slow


def requirements(package: Distribution, visited: dict[str, Distribution]) -> Iterator[Distribution]:
    """Yield the installed distributions that a package requires, recursively, without extras.

    Distributions are added to `visited`, and those already in it are skipped.
    """
    for text in package.requires or ():
        requirement = Requirement(text)
        if requirement.name in visited or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            visited[requirement.name] = distribution(requirement.name)
        except PackageNotFoundError:  # PyTorch's requirements differ between machines.
            continue
        yield visited[requirement.name]
        yield from requirements(visited[requirement.name], visited)


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and an empty working folder."""

    python: Path
    folder: Path

    def run(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        return subprocess.run(
            [str(self.python.parent / str(words[0])), *map(str, words[1:])],
            cwd=self.folder,
            env=inherited | {"HOME": str(self.folder)} | environment,
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "gridcap.py"):
        shutil.copy(ROOT / name, source)
    for name in ("pipeline", "stages"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    # Packages in PYTHONPATH would count as installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(build, env=environment, check=True)
    [wheel] = folder.glob("gridcap-*.whl")
    venv.create(folder / "environment")
    python = folder / "environment" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], env=environment, check=True)
    site = next((folder / "environment").glob("lib/python*/site-packages"))
    [wheel_package] = Distribution.discover(name="gridcap", path=[str(site)])
    # PyTorch is too large to install for a test, so the requirements are linked from this environment.
    for package in requirements(wheel_package, {}):
        for top in sorted(
            {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}
        ):
            if not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))
    (folder / "empty").mkdir()
    return Installed(python, folder / "empty")


@pytest.fixture(scope="module")
def exported(installed: Installed, tiny: Tiny) -> Path:
    """An exported model with its encoder."""
    folder = installed.folder / "model"
    export(tiny.model, folder, with_encoder=True, scores=None, encoder_weights=tiny.weights, download=False)
    return folder


def test_the_wheel_captions_an_image_without_clone_dataset_or_dvc(
    installed: Installed, exported: Path, tiny: Tiny
) -> None:
    image = tiny.images / "00.png"
    for package in ("dvc", "spacy", "pycocoevalcap", "streamlit", "pytest", "benchmarks"):
        result = installed.run("python", "-c", f"import {package}")
        assert f"No module named '{package}'" in result.stderr
    result = installed.run("gridcap", "predict", image, "--model", exported, "--json", "--attention", "plots")
    assert result.returncode == 0, result.stderr
    [expected] = Captioner.load(exported, device="cpu").caption([image])
    row = json.loads(result.stdout)
    assert row["caption"] == expected.text
    assert row["log_probability"] == pytest.approx(expected.log_probability, abs=1e-4)
    assert (installed.folder / "plots" / "00.png").is_file()


@pytest.mark.parametrize(
    ("command", "facts"),
    [
        (("use", "flickr8k"), ["flickr8k.yaml", "clone"]),
        (("repair",), ["package dvc", "pip install '.[pipeline"]),
        (("predict", "a.jpg"), ["data/model/config.json"]),
    ],
)
def test_a_command_that_needs_more_than_the_wheel_is_an_error(
    installed: Installed, command: tuple[str, ...], facts: list[str]
) -> None:
    result = installed.run("gridcap", *command)
    assert result.returncode == 2
    assert [fact for fact in facts if fact not in result.stderr] == []


def test_the_shell_completes_commands_and_flags(installed: Installed) -> None:
    def completed(words: str) -> list[str]:
        environment = {"_GRIDCAP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return installed.run("gridcap", **environment).stdout.split()

    assert completed("gridcap pre") == ["predict"]
    assert "--attention" in completed("gridcap predict --")
    assert "--length-alpha" in completed("gridcap predict --length")
    script = installed.run("gridcap", "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_GRIDCAP_COMPLETE=complete_bash" in script.stdout


def test_version_does_not_import_torch(installed: Installed) -> None:
    site = next(installed.python.parents[1].glob("lib/python*/site-packages"))
    [package] = Distribution.discover(name="gridcap", path=[str(site)])
    result = installed.run("gridcap", "--version", PYTHONPROFILEIMPORTTIME="1")
    assert (result.returncode, result.stdout) == (0, f"gridcap {package.version}\n")
    assert "typer" in result.stderr
    assert "torch" not in result.stderr


def test_help_names_the_first_commands(installed: Installed) -> None:
    result = installed.run("gridcap", "--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    assert "make repro" in text
    assert "gridcap predict" in text
