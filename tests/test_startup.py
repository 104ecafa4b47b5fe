"""Ctrl-C while a command starts, runs and ends."""

import signal
import subprocess
import sys

import pytest

from tests.paths import ROOT

PROLOGUE = """
import os, signal, sys
from pipeline.startup import defer_interrupts, handle_interrupts
handle_interrupts()
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
"""


def run_program(program: str) -> tuple[int, str, str]:
    process = subprocess.run([sys.executable, "-c", PROLOGUE + program], cwd=ROOT, capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize(
    "body",
    [
        "interrupt()",
        "try:\n        interrupt()\n    except KeyboardInterrupt:\n        raise ImportError('from C code')",
        "try:\n        interrupt()\n    except KeyboardInterrupt:\n        sys.exit(3)",
        "import tests.interrupted_import",
    ],
    ids=["command", "other error", "other status", "import"],
)
def test_an_interrupted_command_prints_one_line(body: str) -> None:
    program = f"from pipeline.errors import run\ndef main() -> None:\n    {body}\nrun(main)\n"
    assert run_program(program) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    "program",
    [
        "interrupt()",
        "class A:\n    def __del__(self):\n        raise KeyboardInterrupt\nA()",
        "import threading\nthreading._register_atexit(interrupt)",
    ],
    ids=["start", "finalizer", "exit"],
)
def test_an_interrupt_outside_the_command_prints_one_line(program: str) -> None:
    assert run_program(program) == (130, "", "interrupted\n")


def test_a_deferred_interrupt_takes_effect_after_the_block() -> None:
    program = "with defer_interrupts():\n    interrupt()\n    print('done', flush=True)\nprint('never')"
    assert run_program(program) == (130, "done\n", "interrupted\n")


def test_an_ignored_interrupt_stays_ignored() -> None:
    program = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nhandle_interrupts()\ninterrupt()\nprint('done')"
    assert run_program(program) == (0, "done\n", "")


def test_other_unraisable_errors_are_shown() -> None:
    status, _, message = run_program("class A:\n    def __del__(self):\n        raise ValueError('fault')\nA()")
    assert status == 0
    assert "ValueError: fault" in message


@pytest.mark.slow
@pytest.mark.parametrize("module", ["typer", "pydantic", "numpy", "torch.nn", "torch"])
def test_a_stage_is_interrupted_after_it_imported_a_module(module: str) -> None:
    options = [f"--{name}=missing" for name in ("params", "tokens", "features", "out", "work", "live")]
    command = [sys.executable, "-X", "importtime", "-m", "stages.train_decoder", *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while process.stderr.readline().rpartition("|")[2].strip() != module:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        messages = [line for line in process.stderr.read().splitlines() if not line.startswith("import time:")]
    assert (process.returncode, messages) == (130, ["interrupted"])
