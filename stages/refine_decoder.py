"""Stage `refine`: self-critical training of the trained decoder."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import publish
from pipeline.device import DeviceOption, setup_device
from pipeline.errors import run
from pipeline.params import load, require_unchanged


def main(
    params: Annotated[Path, typer.Option(help="Params file with section `refine`.")],
    tokens: Annotated[Path, typer.Option(help="Folder of tokens and vocabulary, from `tokenize`.")],
    features: Annotated[Path, typer.Option(help="Feature store, from `encode`.")],
    trained: Annotated[Path, typer.Option(help="Model folder, from `train`.")],
    out: Annotated[Path, typer.Option(help="Output folder of the model.")],
    work: Annotated[Path, typer.Option(help="Folder of unfinished runs and their checkpoints.")],
    live: Annotated[Path, typer.Option(help="Output folder of live metrics.")],
    device: DeviceOption = "auto",
    checkpoint_seconds: Annotated[
        int, typer.Option(min=0, max=86_400, help="Maximum seconds between checkpoints.")
    ] = 60,
    checkpoint_steps: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Maximum optimizer steps between checkpoints.")
    ] = 1000,
    live_steps: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Optimizer steps between rows of live metrics.")
    ] = 10,
) -> None:
    """Refine the decoder by self-critical training, or publish it unchanged if `refine.max_epochs` is 0.

    Resumes after an interruption. Runs on many processes under torchrun.
    """
    # Imported here so that --help is fast.
    from pipeline.distributed import init_processes
    from pipeline.training.loop import Intervals
    from pipeline.training.refine import refine
    from pipeline.training.self_critical import RefineParams
    from pipeline.training.train import TrainPaths

    refine_params, torch_device = load(params, "refine", RefineParams), setup_device(device)
    paths = TrainPaths(tokens=tokens, features=features, work=work, live=live)
    intervals = Intervals(
        checkpoint_steps=checkpoint_steps, checkpoint_seconds=checkpoint_seconds, live_steps=live_steps
    )
    with (
        init_processes() as processes,
        refine(trained, refine_params, paths, torch_device, intervals, processes) as model,
    ):
        if processes.is_main:
            require_unchanged(params, "refine", refine_params)
            publish(model, out)


if __name__ == "__main__":
    run(main)
