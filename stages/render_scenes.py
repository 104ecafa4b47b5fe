"""Stage `render`: the embedded dataset of rendered scenes, with captions in COCO's format."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import run
from pipeline.params import load, require_unchanged
from pipeline.scenes.dataset import RenderParams, write_dataset


def main(
    params: Annotated[Path, typer.Option(help="Params file; its section render is read.")],
    out: Annotated[Path, typer.Option(help="Folder of the dataset, replaced when all is done.")],
    work: Annotated[Path, typer.Option(help="Folder for finished pictures, which outlive kills.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes that render.")] = os.cpu_count() or 1,
) -> None:
    """Render the scenes and word their captions; go on where an earlier run was killed."""
    settings = load(params, "render", RenderParams)
    write_dataset(settings, out, work, workers)
    require_unchanged(params, "render", settings)


if __name__ == "__main__":
    run(main)
