"""Run the commands `gridcap`, `torchrun` and `git`."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from typer.testing import CliRunner, Result

from pipeline.cli import app
from tests.paths import ROOT


def gridcap(*arguments: object, stdin: bytes | None = None, columns: int = 200) -> Result:
    """Run a command in the process of the test. A raised error is in `exception` of the result.

    Args:
        arguments: Command line after `gridcap`.
        stdin: Standard input.
        columns: Width of the terminal, in characters.
    """
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], input=stdin, env={"COLUMNS": str(columns)}
    )


def gridcap_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, as users do."""
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def torchrun(command: Sequence[str], logs: Path) -> list[str]:
    """Return the command that runs another one of this interpreter in two processes.

    Args:
        command: The interpreter and its arguments.
        logs: Folder of the logs, which otherwise remain in the temporary folder of the machine.
    """
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--log-dir={logs}", *command[1:]]


def git(folder: Path, *arguments: str) -> None:
    """Run a git command in a folder."""
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *author, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
