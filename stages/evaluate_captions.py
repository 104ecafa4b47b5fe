"""Stage `evaluate`: metrics of the generated captions, training curves, attention plots and the report."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import fresh_folder, publish
from pipeline.captions.records import Split
from pipeline.device import setup_device
from pipeline.errors import run
from pipeline.evaluation.evaluate import EvaluateParams, Inputs, evaluate
from pipeline.params import load, load_key, read_yaml, require_unchanged


def main(
    params: Annotated[Path, typer.Option(help="Params file; all sections, which the report shows.")],
    prepared: Annotated[Path, typer.Option(help="Records, from prepare.")],
    tokens: Annotated[Path, typer.Option(help="Tokens, from tokenize.")],
    features: Annotated[Path, typer.Option(help="Feature store, from encode.")],
    model: Annotated[Path, typer.Option(help="Model folder, from train.")],
    generated: Annotated[Path, typer.Option(help="Captions and attention, from generate.")],
    metrics: Annotated[Path, typer.Option(help="Output folder of JSON metrics.")],
    plots: Annotated[Path, typer.Option(help="Output folder of plots.")],
    report: Annotated[Path, typer.Option(help="Output HTML file.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", envvar="GRIDCAP_DEVICE")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images scored at once.")] = 64,
) -> None:
    """Score the generated captions of a split."""
    settings = load(params, "evaluate", EvaluateParams)
    split: Split = load_key(params, "generate.split", Split)
    images: Path = load_key(params, "dataset.root", Path) / load_key(params, "dataset.images", str)
    inputs = Inputs(
        prepared=prepared, images=images, tokens=tokens, features=features, model=model, generated=generated
    )
    with fresh_folder(plots) as folder:
        evaluate(settings, split, inputs, metrics, folder, report, read_yaml(params), setup_device(device), batch_size)
        require_unchanged(params, "evaluate", settings)
        publish(folder, plots)


if __name__ == "__main__":
    run(main)
