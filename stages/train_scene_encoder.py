"""Stage `encoder`: train the image encoder of the embedded dataset on rendered scenes."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import publish_together
from pipeline.device import setup_device
from pipeline.errors import run
from pipeline.params import load, require_unchanged


def main(
    params: Annotated[Path, typer.Option(help="Params file with sections `encoder` and `render`.")],
    out: Annotated[Path, typer.Option(help="Output safetensors file of the encoder weights.")],
    metrics: Annotated[Path, typer.Option(help="Output JSON file of metrics.")],
    work: Annotated[Path, typer.Option(help="Folder of checkpoints, kept between runs.")],
    num_workers: Annotated[int, typer.Option(min=1, max=1024, help="Number of rendering processes.")] = os.cpu_count()
    or 1,
) -> None:
    """Train the encoder on rendered scenes. Resumes after the last complete epoch."""
    # Imported here so that --help is fast.
    from pipeline.scenes.dataset import RenderParams
    from pipeline.scenes.encoder_training import SceneEncoderParams, train_scene_encoder

    setup_device("cpu")
    encoder_params, render_params = load(params, "encoder", SceneEncoderParams), load(params, "render", RenderParams)
    with train_scene_encoder(encoder_params, render_params, work, num_workers) as (weights, metrics_file):
        require_unchanged(params, "encoder", encoder_params)
        require_unchanged(params, "render", render_params)
        publish_together({out: weights, metrics: metrics_file})


if __name__ == "__main__":
    run(main)
