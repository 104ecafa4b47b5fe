"""Stage `encoder` of the embedded dataset: its own image encoder, trained on rendered scenes."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.device import open_device
from pipeline.errors import run
from pipeline.params import load, require_unchanged
from pipeline.publish import write_json
from pipeline.scenes.dataset import RenderParams
from pipeline.scenes.encoder_training import SceneEncoderParams, train_scene_encoder


def main(
    params: Annotated[Path, typer.Option(help="Params file; its sections encoder and render are read.")],
    out: Annotated[Path, typer.Option(help="Safetensors file for the encoder's weights.")],
    metrics: Annotated[Path, typer.Option(help="JSON file for what the encoder can tell of scenes.")],
    work: Annotated[Path, typer.Option(help="Folder for finished epochs, which outlive kills.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes that render.")] = os.cpu_count() or 1,
) -> None:
    """Train the encoder of rendered scenes; go on after the last epoch that an earlier run finished."""
    open_device("cpu")
    settings, render = load(params, "encoder", SceneEncoderParams), load(params, "render", RenderParams)
    figures = train_scene_encoder(settings, render, work, out, workers)
    require_unchanged(params, "encoder", settings)
    require_unchanged(params, "render", render)
    write_json(metrics, figures)


if __name__ == "__main__":
    run(main)
