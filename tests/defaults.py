"""Committed files, such as the default params.yaml, which `gridcap use` changes in the working tree."""

import subprocess

from tests.paths import ROOT


def committed(path: str) -> str:
    """Read a file of the last commit, or of the working tree where there is no git history."""
    command = ["git", "show", f"HEAD:{path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else (ROOT / path).read_text()
