"""Signals during training."""

import os
import signal
import subprocess
import sys

import pytest

from pipeline.distributed import SINGLE_PROCESS
from pipeline.training.interrupts import defer_signals

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_is_deferred_and_handlers_are_restored(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with defer_signals() as interrupt:
        assert not interrupt.requested
        interrupt.exit_if_requested(SINGLE_PROCESS)  # no effect yet
        os.kill(os.getpid(), signum)
        assert interrupt.requested
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("signum", SIGNALS)
def test_an_ignored_signal_is_still_ignored(signum: signal.Signals) -> None:
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with defer_signals() as interrupt:
            os.kill(os.getpid(), signum)
            assert not interrupt.requested
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "status", "message"), [(signal.SIGTERM, -signal.SIGTERM, ""), (signal.SIGINT, 130, "interrupted\n")]
)
def test_the_process_ends_after_the_signal_once_it_may(signum: signal.Signals, status: int, message: str) -> None:
    script = f"""
import os
from pipeline.errors import run
from pipeline.distributed import SINGLE_PROCESS
from pipeline.training.interrupts import defer_signals
def main() -> None:
    with defer_signals() as interrupt:
        os.kill(os.getpid(), {int(signum)})
        print("after the signal", flush=True)
        interrupt.exit_if_requested(SINGLE_PROCESS)
        print("never", flush=True)
run(main)
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.stdout == "after the signal\n"
    assert (process.returncode, process.stderr) == (status, message)
