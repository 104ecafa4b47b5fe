"""Ctrl-C at any moment of a command: exit status 130 and one line, without a traceback.

Commands import this module before anything that is slow to import.
"""

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

INTERRUPT_STATUS = 130
"""Exit status of an interrupted command: 128 plus the number of SIGINT, as shells report it."""


class _State:
    is_running = False
    """Whether the function of the command is running."""
    is_interrupted = False
    """Whether the running command has received an interrupt."""
    is_reported = False
    is_deferring = False
    is_pending = False


def handle_interrupts() -> None:
    """Handle SIGINT: raise `KeyboardInterrupt` inside `interruptible`, exit at once outside it, as during imports.

    The second interrupt always exits at once. A process that ignores SIGINT, such as a background job of a script,
    continues to ignore it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _receive)
        sys.unraisablehook = _report_unraisable
        # Registered first, so it runs last: from then on Python could only kill the process, whose work is done.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


@contextmanager
def interruptible() -> Iterator[None]:
    """Run the function of a command: an interrupt raises `KeyboardInterrupt` in the block."""
    _State.is_running, _State.is_interrupted = True, False
    try:
        yield
    finally:
        _State.is_running = False


def is_interrupted() -> bool:
    """Whether an interrupt has been received in `interruptible`. Libraries may turn it into another exception."""
    return _State.is_interrupted


def report_interrupt() -> None:
    """Print one line about the interrupt, once."""
    if not _State.is_reported:
        _State.is_reported = True
        os.write(2, b"interrupted\n")


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Let the block finish before an interrupt takes effect: for short calls of C code that calls Python code back, and
    for renames that belong together.
    """
    _State.is_deferring, _State.is_pending = True, False
    try:
        yield
    finally:
        _State.is_deferring = False
    if _State.is_pending:
        signal.raise_signal(signal.SIGINT)


def _receive(signum: int, frame: FrameType | None) -> None:
    if _State.is_deferring:
        _State.is_pending = True
        return
    # An exception in an import can be lost in C code, or leave a half-initialized module behind.
    if not _State.is_running or _State.is_interrupted or _is_importing(frame):
        _exit_at_once()
    _State.is_interrupted = True
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _report_unraisable(unraisable: Any) -> None:
    """Exit if an interrupt was raised where Python ignores exceptions, such as in a finalizer."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _exit_at_once()
    sys.__unraisablehook__(unraisable)


def _exit_at_once() -> None:
    report_interrupt()
    os._exit(INTERRUPT_STATUS)
