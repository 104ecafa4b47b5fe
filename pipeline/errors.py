"""Errors that a user can mend, and how a command reports them."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer


class UserError(Exception):
    """A mistake in files or settings, told in one message: where it is, what was found, what to do."""

    exit_status = 2


def run(command: Callable[..., Any]) -> NoReturn:
    """Run a function or a typer application as this process's command; report a `UserError` without a traceback.

    Exits with 0 on success, with 2 on a `UserError` or wrong flags, with 130 when interrupted.
    """
    if isinstance(command, typer.Typer):
        app = command
    else:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(command)
    try:
        app()
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(UserError.exit_status)
    sys.exit(0)
