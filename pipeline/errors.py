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
    """An error in files or settings: one message that says where it is, what is wrong and what to do."""

    exit_status = 2


def run(command: Callable[..., Any]) -> NoReturn:
    """Run a function or a typer application as the command of this process.

    Exits with status 0 on success and with 2, after a message instead of a traceback, on a `UserError`, an invalid
    flag, an unusable file, a full disk or a missing package; with 130 when interrupted.
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
    """Writes log lines to standard error, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    logger = logging.getLogger("gridcap")
    if not logger.handlers:
        logger.addHandler(_StderrHandler())
    logger.setLevel(logging.INFO)


def summarize(faults: Sequence[str], limit: int = 3) -> str:
    """List the first few faults and count the rest."""
    rest = len(faults) - limit
    return "; ".join(faults[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def _message(error: UserError | ModuleNotFoundError | OSError) -> str | None:
    """Message for the user, or None for an internal error."""
    if isinstance(error, ModuleNotFoundError):
        if error.name is None or error.name.partition(".")[0] in ("gridcap", "pipeline", "stages"):
            return None
        return f"the Python package {error.name} is not installed. Run `pip install '.[pipeline,app]'` in a clone."
    if isinstance(error, OSError):
        if error.filename is None and error.errno not in NO_SPACE:
            return None
        found = ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
        remedy = "Free disk space" if error.errno in NO_SPACE else "Check that it exists and is accessible"
        return f"{found}. {remedy}, then run again."
    return str(error)
