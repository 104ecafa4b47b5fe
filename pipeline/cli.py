"""The user's commands: `gridcap use`, `gridcap inspect`, `gridcap mend`.

What is heavy to import is imported inside the command that needs it: `gridcap --help` answers at once.
"""

from pathlib import Path
from typing import Annotated

import typer

from pipeline import errors

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Image captioners that look at the right part of the picture for each word.",
)


def main() -> None:
    """Run the console script `gridcap`."""
    errors.run(app)


@app.command()
def use(
    preset: Annotated[str, typer.Argument(help="Name of a preset in the folder presets, or a YAML file.")],
    assignments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Single values, such as train.seed=3."),
    ] = None,
    params: Annotated[Path, typer.Option(help="The params file to change.")] = Path("params.yaml"),
) -> None:
    """Set params.yaml to a preset; `dvc repro` then runs what that changes."""
    from pipeline import presets

    path = presets.find_preset(preset, params.parent / "presets")
    presets.use(path, assignments or [], params)
    print(f"{params} is set to {path}; `dvc repro` runs what that changes")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="An HDF5 file of the pipeline, or a folder with such files.")],
) -> None:
    """Show what an artefact holds: its attributes, its datasets and a few rows, decoded."""
    from pipeline.inspection import describe

    for line in describe(path):
        print(line)


@app.command()
def mend(
    repository: Annotated[Path, typer.Argument(help="The repository, in which no `dvc` runs.")] = Path(),
) -> None:
    """Put right what a kill left half written of DVC's own lock files; `make repro` does this first."""
    from pipeline import mending

    for path in mending.mend(repository):
        print(f"{path} had been cut by a kill; `dvc repro` finds again what it had recorded")
