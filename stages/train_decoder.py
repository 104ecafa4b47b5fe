"""Stage `train`: the attention LSTM on cached grids, taken up where an earlier run was interrupted."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from pipeline.captions.tokens import TOKENS_FILE, VOCABULARY_FILE
from pipeline.decoder.card import write_card
from pipeline.decoder.saved import note_origin
from pipeline.decoder.trainer import Rhythm, TrainParams, train
from pipeline.device import open_device
from pipeline.errors import run
from pipeline.features.store import INDEX_FILE
from pipeline.params import load, plain, require_unchanged
from pipeline.publish import code_digest, file_digest, fingerprint, publish
from pipeline.ranks import open_ranks


def main(
    params: Annotated[Path, typer.Option(help="Params file; its section `train` is read.")],
    tokens: Annotated[Path, typer.Option(help="Folder of tokens.h5 and vocabulary.json, from `tokenize`.")],
    features: Annotated[Path, typer.Option(help="Feature store, from `encode`.")],
    out: Annotated[Path, typer.Option(help="Model folder to publish.")],
    work: Annotated[Path, typer.Option(help="Folder for unfinished work.")],
    live: Annotated[Path, typer.Option(help="Folder of the metrics that are shown while training runs.")],
    dataset: Annotated[str, typer.Option(help="Where the dataset came from, for the model's card.")],
    encoder_weights: Annotated[str, typer.Option(help="What `encode` took for weights, so that `predict` finds them.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", envvar="GRIDCAP_DEVICE")] = "auto",
    checkpoint_seconds: Annotated[float, typer.Option(help="Longest time between two checkpoints.")] = 60.0,
    checkpoint_steps: Annotated[int, typer.Option(min=1, help="Most steps between two checkpoints.")] = 1000,
    live_steps: Annotated[int, typer.Option(min=1, help="Steps from one row of live metrics to the next.")] = 10,
) -> None:
    """Train the decoder; stop it at any moment and run it again to go on. Under torchrun, processes share batches."""
    settings = load(params, "train", TrainParams)
    with open_ranks() as ranks:
        name = fingerprint(
            params=plain(settings),
            tokens=file_digest(tokens / TOKENS_FILE),
            vocabulary=file_digest(tokens / VOCABULARY_FILE),
            features=file_digest(features / INDEX_FILE),
            code=code_digest(),
            torch=torch.__version__,
            processes=ranks.size,
        )
        rhythm = Rhythm(checkpoint_steps=checkpoint_steps, checkpoint_seconds=checkpoint_seconds, live_steps=live_steps)
        with ranks.work_folder(work, "train", name) as folder:
            model = train(settings, tokens, features, folder, live, open_device(device), rhythm, ranks)
            if ranks.first:
                require_unchanged(params, "train", settings)
                write_card(model, note_origin(model, dataset, encoder_weights))
                publish(model, out)


if __name__ == "__main__":
    run(main)
