"""The wheel, installed where there is nothing but what it asks for: neither a clone nor DVC nor a dataset."""

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
from tests.tiny_captioner import Tiny

ROOT = Path(__file__).parents[1]


def asked_for(package: Distribution, found: dict[str, Distribution]) -> Iterator[Distribution]:
    """The distributions of this environment that a package needs, with theirs; extras are left out."""
    for text in package.requires or ():
        requirement = Requirement(text)
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[requirement.name] = distribution(requirement.name)
        except PackageNotFoundError:  # What PyTorch asks for besides is not the same on every machine.
            continue
        yield found[requirement.name]
        yield from asked_for(found[requirement.name], found)


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and an empty folder to run it in."""

    python: Path
    folder: Path

    def run(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        return subprocess.run(
            [str(self.python.parent / str(words[0])), *map(str, words[1:])],
            cwd=self.folder,
            env=kept | {"HOME": str(self.folder)} | environment,
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pipeline", "stages"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(build, check=True)
    [wheel] = folder.glob("gridcap-*.whl")
    venv.create(folder / "environment")
    python = folder / "environment" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    site = next((folder / "environment").glob("lib/python*/site-packages"))
    [own] = Distribution.discover(name="gridcap", path=[str(site)])
    # PyTorch is too large to be installed for a test: what the wheel asks for, and nothing else, comes from here.
    for package in asked_for(own, {}):
        for top in sorted(
            {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}
        ):
            if not (site / top).exists():
                (site / top).symlink_to(package.locate_file(top))
    (folder / "elsewhere").mkdir()
    return Installed(python, folder / "elsewhere")


@pytest.fixture(scope="module")
def traveled(installed: Installed, tiny: Tiny) -> Path:
    """An exported model with its encoder, and nothing else of where it was trained."""
    folder = installed.folder / "model"
    export(tiny.model, folder, with_encoder=True, scores=None, encoder_weights=tiny.weights, download=False)
    return folder


def test_the_wheel_captions_a_picture_without_clone_dataset_or_dvc(
    installed: Installed, traveled: Path, tiny: Tiny
) -> None:
    picture = tiny.images / "00.png"
    for package in ("dvc", "dvclive", "spacy", "pycocoevalcap", "streamlit", "pytest", "benchmarks"):
        found = installed.run("python", "-c", f"import {package}")
        assert f"No module named '{package}'" in found.stderr
    result = installed.run("gridcap", "predict", picture, "--model", traveled, "--json", "--attention", "strips")
    assert result.returncode == 0, result.stderr
    [expected] = Captioner.load(traveled, device="cpu").caption([picture])
    row = json.loads(result.stdout)
    assert row["caption"] == expected.text
    assert row["log_probability"] == pytest.approx(expected.log_probability, abs=1e-4)
    assert (installed.folder / "strips" / "00.png").is_file()


def test_what_needs_more_than_the_wheel_says_so(installed: Installed) -> None:
    used = installed.run("gridcap", "use", "flickr8k")
    assert used.returncode == 2
    assert "flickr8k.yaml: no such preset; name a YAML file or run this in a clone" in used.stderr
    mended = installed.run("gridcap", "mend")
    assert mended.returncode == 2
    assert "error: this needs the Python package dvc" in mended.stderr
    assert "pip install '.[pipeline" in mended.stderr
    predicted = installed.run("gridcap", "predict", "a.jpg")
    assert predicted.returncode == 2
    assert "data/model/config.json: cannot be read" in predicted.stderr


def test_the_shell_completes_commands_and_flags(installed: Installed) -> None:
    def completed(words: str) -> list[str]:
        asked = {"_GRIDCAP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return installed.run("gridcap", **asked).stdout.split()

    assert completed("gridcap pre") == ["predict"]
    assert "--attention" in completed("gridcap predict --")
    assert "--length-alpha" in completed("gridcap predict --length")
    script = installed.run("gridcap", "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_GRIDCAP_COMPLETE=complete_bash" in script.stdout


def test_the_version_is_told_without_loading_pytorch(installed: Installed) -> None:
    own = next(installed.python.parents[1].glob("lib/python*/site-packages"))
    [package] = Distribution.discover(name="gridcap", path=[str(own)])
    told = installed.run("gridcap", "--version", PYTHONPROFILEIMPORTTIME="1")
    assert (told.returncode, told.stdout) == (0, f"gridcap {package.version}\n")
    assert "typer" in told.stderr
    assert "torch" not in told.stderr


def test_help_tells_a_newcomer_what_to_do_first(installed: Installed) -> None:
    shown = installed.run("gridcap", "--help")
    assert shown.returncode == 0
    told = " ".join(shown.stdout.split())
    assert "make repro" in told
    assert "gridcap predict" in told
