"""What a program has imported."""

import subprocess
import sys
from collections.abc import Sequence

from tests.paths import ROOT


def imported_packages(program: str, packages: Sequence[str]) -> list[str]:
    """Run a Python program in a new process and return which of some packages it has imported at its end."""
    program += f"\nimport sys\nprint(*(name for name in {list(packages)} if name in sys.modules))"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
