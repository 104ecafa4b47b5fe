"""Stage `prepare`: one record an image, whatever format the dataset comes in."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.captions.records import write_records
from pipeline.captions.sources.dataset import DatasetParams, prepare
from pipeline.errors import run
from pipeline.params import load, require_unchanged
from pipeline.publish import fresh_folder, publish, write_json


def main(
    params: Annotated[Path, typer.Option(help="Params file; its section `dataset` is read.")],
    out: Annotated[Path, typer.Option(help="Folder to publish: records.jsonl.")],
    metrics: Annotated[Path, typer.Option(help="JSON file for the counts.")],
) -> None:
    """Read the dataset that the params name, check it and write it as records."""
    settings = load(params, "dataset", DatasetParams)
    records, counts = prepare(settings)
    with fresh_folder(out) as folder:
        write_records(folder, records)
        require_unchanged(params, "dataset", settings)
        publish(folder, out)
    write_json(metrics, asdict(counts))


if __name__ == "__main__":
    run(main)
