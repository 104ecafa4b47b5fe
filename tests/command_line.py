"""The command `gridcap` in the process of a test."""

from typer.testing import CliRunner, Result

from pipeline.cli import app


def gridcap(*arguments: object, stdin: bytes | None = None, columns: int = 200) -> Result:
    """Run a command. An exception that it raises is in `exception` of the result."""
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], input=stdin, env={"COLUMNS": str(columns)}
    )
