"""Errors that a user can fix, and how commands report them."""

import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import typer
from tqdm import tqdm

from pipeline.startup import INTERRUPT_STATUS, handle_interrupts, interruptible, is_interrupted, report_interrupt

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """An error in files or settings that the user can fix. Its message has the form `FILE:PLACE: fault. Remedy.`

    Several arguments are the lines of a longer message.
    """

    exit_status = 2

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def run(command: Callable[..., Any]) -> NoReturn:
    """Run a function or a typer application as the command of this process, then exit.

    The exit status is 0 on success, and 130 after an interrupt, at any moment. A `UserError`, an invalid flag, an
    inaccessible file, a full disk or a missing package prints a message instead of a traceback and gives status 2.
    """
    handle_interrupts()
    if isinstance(command, typer.Typer):
        app = command
    else:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(command)
    _log_to_stderr()
    try:
        with interruptible():
            status = _run(app)
    except BaseException:
        if not is_interrupted():
            raise
        status = INTERRUPT_STATUS
    if status and is_interrupted():
        status = INTERRUPT_STATUS
    if status == INTERRUPT_STATUS:
        report_interrupt()
    sys.exit(status)


def _run(app: typer.Typer) -> int | str | None:
    """Run an application, print its error, if any, and return the exit status."""
    try:
        try:
            app()
        except SystemExit as error:
            sys.stdout.flush()
            return error.code
    except (UserError, ModuleNotFoundError, OSError) as error:
        message = _message(error)
        if message is None:
            raise
        _flush_or_discard()
        for line in message:
            print(line, file=sys.stderr)
        return UserError.exit_status
    return 0


def _flush_or_discard() -> None:
    """Flush standard output. If that fails, discard it, so that Python does not try again at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _StderrHandler(logging.Handler):
    """Write log messages to standard error, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stderr)


def _log_to_stderr() -> None:
    logger = logging.getLogger("gridcap")
    if not logger.handlers:
        logger.addHandler(_StderrHandler())
    logger.setLevel(logging.INFO)


def summarize(faults: Sequence[str], limit: int = 3) -> str:
    """List the first few faults and count the rest."""
    num_unlisted = len(faults) - limit
    return "; ".join(faults[:limit]) + (f"; and {num_unlisted} more" if num_unlisted > 0 else "")


def printable(text: str) -> str:
    """Escape what could control a terminal or break a line: control, format and separator characters, and surrogates.

    Use it for all text from files that is printed. The escapes are those of JSON.
    """
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))


def no_space_message(error: OSError, path: Path) -> str:
    """Return the fault of a file that could not be written to a full disk, with the free space."""
    folder = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return f"{path}: cannot be written ({error.strerror}). {shutil.disk_usage(folder).free:,} bytes are free now"


def write_error(error: OSError, path: Path, remedy: str) -> UserError:
    """Convert an error of a write to a `UserError`.

    Args:
        error: The error.
        path: The file that was written.
        remedy: What the user should do, as a sentence, unless the disk is full.
    """
    if error.errno in NO_SPACE:
        return UserError(f"{no_space_message(error, path)}. Free disk space, then run again.")
    return UserError(f"{path}: cannot be written ({error.strerror}). {remedy}")


def _message(error: UserError | ModuleNotFoundError | OSError) -> list[str] | None:
    """Return the lines to print for the user, or None for an internal error."""
    match error:
        case UserError():
            lines = [str(line) for line in error.args]
        case ModuleNotFoundError():
            if error.name is None or error.name.partition(".")[0] in ("gridcap", "pipeline", "stages"):
                return None
            lines = [
                f"the Python package {error.name} is not installed. Run `pip install '.[pipeline,app]'` in a clone."
            ]
        case OSError() if error.errno in NO_SPACE:
            path = error.filename2 or error.filename
            fault = no_space_message(error, Path(os.fsdecode(path))) if path else str(error.strerror)
            lines = [f"{fault}. Free disk space, then run again."]
        case _:
            if error.filename is None:
                return None
            lines = [f"{error.filename}: {error.strerror}. Check that it exists and is accessible, then run again."]
    first, *remaining = map(printable, lines)
    return [f"error: {first}", *remaining]
