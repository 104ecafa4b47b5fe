"""Stage `evaluate`: scores of the generated captions, curves of training, pictures of attention, the report."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.captions.records import Split
from pipeline.device import open_device
from pipeline.errors import run
from pipeline.evaluation.results import EvaluateParams, Inputs, evaluate
from pipeline.params import load, read_yaml, require_unchanged
from pipeline.publish import fresh_folder, publish


def main(
    params: Annotated[Path, typer.Option(help="Params file; its section `evaluate` is read, all of it is shown.")],
    split: Annotated[Split, typer.Option(help="Split that was captioned.")],
    prepared: Annotated[Path, typer.Option(help="Folder of records, from `prepare`.")],
    images: Annotated[Path, typer.Option(help="Folder that the records' files are below.")],
    tokens: Annotated[Path, typer.Option(help="Folder of tokens.h5, from `tokenize`.")],
    features: Annotated[Path, typer.Option(help="Feature store, from `encode`.")],
    model: Annotated[Path, typer.Option(help="Model folder, from `train`.")],
    generated: Annotated[Path, typer.Option(help="Folder of captions and attention, from `generate`.")],
    metrics: Annotated[Path, typer.Option(help="Folder for the JSON files of scores.")],
    plots: Annotated[Path, typer.Option(help="Folder to publish: curves and pictures.")],
    report: Annotated[Path, typer.Option(help="HTML file to write: the page that shows it all.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", envvar="GRIDCAP_DEVICE")] = "auto",
    images_a_batch: Annotated[int, typer.Option(help="Images scored together.")] = 64,
) -> None:
    """Score the generated captions of a split."""
    settings = load(params, "evaluate", EvaluateParams)
    inputs = Inputs(
        prepared=prepared, images=images, tokens=tokens, features=features, model=model, generated=generated
    )
    with fresh_folder(plots) as folder:
        where = open_device(device)
        evaluate(settings, split, inputs, metrics, folder, report, read_yaml(params), where, images_a_batch)
        require_unchanged(params, "evaluate", settings)
        publish(folder, plots)


if __name__ == "__main__":
    run(main)
