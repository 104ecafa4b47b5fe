"""The benchmarks for a GPU, in their small form on a CPU."""

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.paths import ROOT


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        pytest.param(["train", "search"], "gridcap, bfloat16", marks=pytest.mark.slow),
        pytest.param([], "resume after kill -9", marks=pytest.mark.exhaustive),
    ],
)
def test_the_small_form_runs(sections: Sequence[str], line: str) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", *sections]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"GRIDCAP_DEVICE": "cpu"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for section in sections or ["encode", "train", "search", "pipeline", "resume"]:
        assert f"== {section}:" in result.stdout
    assert line in result.stdout
