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
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every shard of a feature store with its index, instead.")
    ] = False,
    image: Annotated[
        int | None,
        typer.Option(metavar="ID", help="Draw this image of a feature store beside its grid, instead; needs --out."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="PNG file for the image and its grid.")] = None,
    prepared: Annotated[Path, typer.Option(help="Folder whose records.jsonl names the image's file.")] = Path(
        "data/prepared"
    ),
    params: Annotated[Path, typer.Option(help="Params file whose section dataset names the images' folder.")] = Path(
        "params.yaml"
    ),
) -> None:
    """Show what an artefact holds: its attributes, its datasets and a few rows, decoded."""
    from pipeline import inspection

    if (image is None) != (out is None):
        raise errors.UserError("--image and --out go together; name an image's id and a PNG file for its grid")
    if verify:
        print(inspection.verify(path))
    if image is not None and out is not None:
        from pipeline.captions.sources.dataset import DatasetParams
        from pipeline.features.viewing import draw_grid
        from pipeline.params import load

        dataset = load(params, "dataset", DatasetParams)
        title = draw_grid(inspection.open_store(path), image, prepared, dataset.root / dataset.images, out)
        print(f"{out}: {inspection.plain(title, limit=1000)}")
    if not verify and image is None:
        for line in inspection.describe(path):
            print(line)


@app.command()
def mend(
    repository: Annotated[Path, typer.Argument(help="The repository, in which no `dvc` runs.")] = Path(),
) -> None:
    """Put right what a kill left half written of DVC's own lock files; `make repro` does this first."""
    from pipeline import mending

    for path in mending.mend(repository):
        print(f"{path} had been cut by a kill; `dvc repro` finds again what it had recorded")
