"""Committed files of the project, independent of what `gridcap use` changed in the working tree."""

import subprocess

from tests.paths import ROOT


def committed(path: str) -> str:
    """Return the text of a file in git's last commit, or in the working tree if there is no git history."""
    command = ["git", "show", f"HEAD:{path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else (ROOT / path).read_text()
