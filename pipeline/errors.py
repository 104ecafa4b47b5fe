"""Errors that a user can fix, and how commands report them."""

import errno
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer
from tqdm import tqdm

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """An error in files or settings that the user can fix. Its message has the form `FILE:PLACE: fault. Remedy.`"""

    exit_status = 2


def run(command: Callable[..., Any]) -> NoReturn:
    """Run a function or a typer application as the command of this process, then exit.

    The exit status is 0 on success and 130 after an interrupt. A `UserError`, an invalid flag, an inaccessible file, a
    full disk or a missing package prints a message instead of a traceback and gives status 2.
    """
    if isinstance(command, typer.Typer):
        app = command
    else:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(command)
    _log_to_stderr()
    try:
        app()
    except (UserError, ModuleNotFoundError, OSError) as error:
        message = _message(error)
        if message is None:
            raise
        sys.stdout.flush()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(UserError.exit_status)
    sys.exit(0)


class _StderrHandler(logging.Handler):
    """Write log messages to standard error, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    logger = logging.getLogger("gridcap")
    if not logger.handlers:
        logger.addHandler(_StderrHandler())
    logger.setLevel(logging.INFO)


def summarize(faults: Sequence[str], limit: int = 3) -> str:
    """List the first few faults and count the rest."""
    num_unlisted = len(faults) - limit
    return "; ".join(faults[:limit]) + (f"; and {num_unlisted} more" if num_unlisted > 0 else "")


def _message(error: UserError | ModuleNotFoundError | OSError) -> str | None:
    """Return the message for the user, or None for an internal error."""
    if isinstance(error, ModuleNotFoundError):
        if error.name is None or error.name.partition(".")[0] in ("gridcap", "pipeline", "stages"):
            return None
        return f"the Python package {error.name} is not installed. Run `pip install '.[pipeline,app]'` in a clone."
    if isinstance(error, OSError):
        if error.filename is None and error.errno not in NO_SPACE:
            return None
        fault = ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
        remedy = "Free disk space" if error.errno in NO_SPACE else "Check that it exists and is accessible"
        return f"{fault}. {remedy}, then run again."
    return str(error)
