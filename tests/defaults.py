"""Committed files, such as the default params.yaml, which `gridcap use` changes in the working tree."""

import subprocess
from typing import Any

from pipeline.params import parse_yaml
from tests.paths import ROOT


def committed(path: str) -> str:
    """Read a file of the last commit, or of the working tree where there is no git history."""
    command = ["git", "show", f"HEAD:{path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else (ROOT / path).read_text()


def default_section(name: str) -> dict[str, Any]:
    """Read a section of the committed params.yaml as plain values."""
    section: dict[str, Any] = parse_yaml(committed("params.yaml"), "params.yaml")[name]
    return section
