"""Stage `train`: the attention LSTM on cached grids, taken up where an earlier run was interrupted."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from pipeline.captions.tokens import TOKENS_FILE, VOCABULARY_FILE
from pipeline.decoder.trainer import TrainParams, train
from pipeline.device import open_device
from pipeline.errors import run
from pipeline.features.store import INDEX_FILE
from pipeline.params import load, plain
from pipeline.publish import code_digest, file_digest, fingerprint, publish, work_folder


def main(
    params: Annotated[Path, typer.Option(help="Params file; its section `train` is read.")],
    tokens: Annotated[Path, typer.Option(help="Folder of tokens.h5 and vocabulary.json, from `tokenize`.")],
    features: Annotated[Path, typer.Option(help="Feature store, from `encode`.")],
    out: Annotated[Path, typer.Option(help="Model folder to publish.")],
    work: Annotated[Path, typer.Option(help="Folder for unfinished work.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", envvar="GRIDCAP_DEVICE")] = "auto",
    checkpoint_seconds: Annotated[float, typer.Option(help="Longest time between two checkpoints.")] = 60.0,
) -> None:
    """Train the decoder; stop it at any moment and run it again to go on."""
    settings = load(params, "train", TrainParams)
    name = fingerprint(
        params=plain(settings),
        tokens=file_digest(tokens / TOKENS_FILE),
        vocabulary=file_digest(tokens / VOCABULARY_FILE),
        features=file_digest(features / INDEX_FILE),
        code=code_digest(),
        torch=torch.__version__,
    )
    place = open_device(device)
    with work_folder(work, "train", name) as folder:
        publish(train(settings, tokens, features, folder, place, checkpoint_seconds), out)


if __name__ == "__main__":
    run(main)
