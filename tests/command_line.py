"""Run `gridcap` in the process of the test."""

from typer.testing import CliRunner, Result

from pipeline.cli import app


def gridcap(*arguments: object, stdin: bytes | None = None, columns: int = 200) -> Result:
    """Run a command. A raised error is in `exception` of the result.

    Args:
        arguments: Command line after `gridcap`.
        stdin: Standard input.
        columns: Width of the terminal, in characters.
    """
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], input=stdin, env={"COLUMNS": str(columns)}
    )
