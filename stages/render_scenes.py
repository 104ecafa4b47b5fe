"""Stage `render`: render the embedded dataset, with captions in COCO's format."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import publish
from pipeline.errors import run
from pipeline.params import load, require_unchanged


def main(
    params: Annotated[Path, typer.Option(help="Params file with section `render`.")],
    out: Annotated[Path, typer.Option(help="Output folder of the dataset.")],
    work: Annotated[Path, typer.Option(help="Folder of finished images, kept between runs.")],
    num_workers: Annotated[int, typer.Option(min=1, max=1024, help="Number of rendering processes.")] = os.cpu_count()
    or 1,
) -> None:
    """Render the scenes and write their captions. Resumes after an interruption."""
    # Imported here so that --help is fast.
    from pipeline.scenes.dataset import RenderParams, write_dataset

    render_params = load(params, "render", RenderParams)
    with write_dataset(render_params, work, num_workers) as dataset:
        require_unchanged(params, "render", render_params)
        publish(dataset, out)


if __name__ == "__main__":
    run(main)
