"""Errors that a user can mend, and how a command reports them."""

import errno
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """A mistake in files or settings, told in one message: where it is, what was found, what to do."""

    exit_status = 2


def run(command: Callable[..., Any]) -> NoReturn:
    """Run a function or a typer application as this process's command; report a `UserError` without a traceback.

    Exits with 0 on success, with 2 on a `UserError`, wrong flags, a file that cannot be used, a full disk or a package
    that is not installed, with 130 when interrupted.
    """
    if isinstance(command, typer.Typer):
        app = command
    else:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(command)
    try:
        app()
    except (UserError, ModuleNotFoundError, OSError) as error:
        told = _told(error)
        if told is None:
            raise
        sys.stdout.flush()
        print(f"error: {told}", file=sys.stderr)
        sys.exit(UserError.exit_status)
    sys.exit(0)


def _told(error: UserError | ModuleNotFoundError | OSError) -> str | None:
    """What a user can mend; None where the fault is ours."""
    if isinstance(error, ModuleNotFoundError):
        if error.name is None or error.name.partition(".")[0] in ("pipeline", "stages"):
            return None
        return (
            f"this needs the Python package {error.name}, which gridcap does without where it only predicts;"
            " install the rest in a clone with `pip install '.[pipeline,app]'`"
        )
    if isinstance(error, OSError):
        if error.filename is None and error.errno not in NO_ROOM:
            return None
        found = ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
        advice = "free space" if error.errno in NO_ROOM else "see that it exists and may be used"
        return f"{found}; {advice}, and run again"
    return str(error)
