"""Files as committed, for tests of defaults: `gridcap use` and `dvc repro` change those in the working tree."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def committed(path: str) -> str:
    """Return the text of a file in the last commit; without a git repository, in the working tree."""
    command = ["git", "show", f"HEAD:{path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout if result.returncode == 0 else (ROOT / path).read_text()
