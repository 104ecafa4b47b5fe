"""The command `gridcap`: help, defaults, and commands without a test module."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from pipeline import __version__, cli
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import EvaluateParams
from pipeline.params import check
from tests.command_line import gridcap
from tests.defaults import default_section
from tests.imports import imported_packages

COMMANDS = {"predict", "export", "use", "download", "inspect", "stats", "score", "compare", "app", "repair"}


def test_the_list_of_commands() -> None:
    names = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert names == COMMANDS


@pytest.mark.slow
def test_the_help_of_every_command_imports_no_heavy_package() -> None:
    program = f"""
from typer.testing import CliRunner
from pipeline.cli import app

for arguments in [["--help"], ["--version"], *([name, "--help"] for name in {sorted(COMMANDS)})]:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output)
"""
    heavy = ["torch", "torchvision", "spacy", "matplotlib", "h5py", "streamlit", "dvc"]
    assert imported_packages(program, heavy) == []


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_is_documented_with_its_default(name: str) -> None:
    [command] = [
        command
        for command in cli.app.registered_commands
        if command.callback and (command.name or command.callback.__name__) == name
    ]
    assert command.callback is not None
    help_text = " ".join(gridcap(name, "--help", columns=300).stdout.split())
    for parameter in inspect.signature(command.callback).parameters.values():
        [declaration] = parameter.annotation.__metadata__
        assert declaration.help, parameter.name
        default = parameter.default
        if default is not parameter.empty and default is not None and not isinstance(default, bool):
            assert f"[default: {default}]" in help_text, parameter.name


def test_score_and_compare_have_the_defaults_of_evaluate() -> None:
    params = check(default_section("evaluate"), "evaluate", EvaluateParams, "params.yaml")
    expected = {
        "tokenizer": params.tokenizer,
        "seed": params.seed,
        "bootstrap_samples": params.bootstrap_samples,
        "meteor": params.meteor,
        "spice": params.spice,
    }
    for command in (cli.score, cli.compare):
        parameters = inspect.signature(command).parameters
        assert {name: parameters[name].default for name in expected} == expected


def test_version_is_printed() -> None:
    result = gridcap("--version")
    assert (result.exit_code, result.stdout) == (0, f"gridcap {__version__}\n")


def test_download_prints_the_path_and_how_to_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def download_weights(name: str, folder: Path, mirror: str | None) -> Path:
        calls.append((name, folder, mirror))
        return folder / "resnet50-0676ba61.pth"

    monkeypatch.setattr("pipeline.features.pretrained.download_weights", download_weights)
    result = gridcap("download", "weights:resnet50/IMAGENET1K_V1", "--root", tmp_path)
    assert result.exit_code == 0, result.output
    path, hint = result.stdout.splitlines()
    assert path == str(tmp_path / "resnet50-0676ba61.pth")
    assert f"encode.architecture=resnet50 encode.weights={path}" in hint
    assert calls == [("resnet50/IMAGENET1K_V1", tmp_path, None)]


@pytest.mark.parametrize("name", ["resnet50", "weights:", "dataset:coco"])
def test_unknown_downloads_are_errors(name: str) -> None:
    result = gridcap("download", name)
    assert isinstance(result.exception, UserError)
    assert name in str(result.exception)
    assert "weights:resnet50" in str(result.exception)
