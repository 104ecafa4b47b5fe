"""Stage `train`: train the decoder on cached grids."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import publish
from pipeline.device import DeviceOption, setup_device
from pipeline.errors import run
from pipeline.params import load, load_key, require_unchanged


def main(
    params: Annotated[
        Path, typer.Option(help="Params file with section `train`, `dataset.root` and `encode.weights`.")
    ],
    tokens: Annotated[Path, typer.Option(help="Folder of tokens and vocabulary, from `tokenize`.")],
    features: Annotated[Path, typer.Option(help="Feature store, from `encode`.")],
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
    """Train the decoder. Resumes after an interruption. Runs on many processes under torchrun."""
    # Imported here so that --help is fast.
    from pipeline.decoder.model_io import record_provenance
    from pipeline.distributed import init_processes
    from pipeline.training.loop import Intervals
    from pipeline.training.train import TrainPaths, train
    from pipeline.training.trainer import TrainParams

    train_params = load(params, "train", TrainParams)
    paths = TrainPaths(tokens=tokens, features=features, work=work, live=live)
    intervals = Intervals(
        checkpoint_steps=checkpoint_steps, checkpoint_seconds=checkpoint_seconds, live_steps=live_steps
    )
    with init_processes() as processes, train(train_params, paths, setup_device(device), intervals, processes) as model:
        if processes.is_main:
            require_unchanged(params, "train", train_params)
            dataset, weights = load_key(params, "dataset.root", str), load_key(params, "encode.weights", str)
            record_provenance(model, dataset, weights)
            publish(model, out)


if __name__ == "__main__":
    run(main)
