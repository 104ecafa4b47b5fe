"""The console script."""

import subprocess
import sys

from tests.paths import ROOT


def test_the_script_runs_the_application() -> None:
    program = "import sys; sys.argv = ['gridcap', '--version']; from pipeline.console import main; main()"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.startswith("gridcap ")


def test_the_script_is_interrupted_while_it_imports() -> None:
    program = (
        "import os, signal, sys\n"
        "sys.addaudithook(lambda event, details: event == 'import' and details[0] == 'typer'"
        " and os.kill(os.getpid(), signal.SIGINT))\n"
        "from pipeline.console import main\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")
