"""Stage `encode`: every image through the frozen ResNet, once, into the feature store."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.captions.records import read_records
from pipeline.device import open_device
from pipeline.errors import run
from pipeline.features.encoder import EncodeParams
from pipeline.features.encoding import encode
from pipeline.params import load, require_unchanged
from pipeline.publish import write_json
from pipeline.ranks import open_ranks


def main(
    params: Annotated[Path, typer.Option(help="Params file; its section encode is read.")],
    prepared: Annotated[Path, typer.Option(help="Folder that holds records.jsonl.")],
    images: Annotated[Path, typer.Option(help="Folder that the records' files are below.")],
    out: Annotated[Path, typer.Option(help="Folder of the feature store, replaced when all is done.")],
    work: Annotated[Path, typer.Option(help="Folder for finished shards, which outlive kills and changed params.")],
    metrics: Annotated[Path, typer.Option(help="JSON file for the store's figures.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", envvar="GRIDCAP_DEVICE")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Threads that decode images.")] = os.cpu_count() or 1,
) -> None:
    """Encode the images of the dataset; go on where an earlier run was killed. Under torchrun, processes share."""
    encode_params = load(params, "encode", EncodeParams)
    with open_ranks() as ranks:
        result = encode(read_records(prepared), images, encode_params, work, out, open_device(device), threads, ranks)
        if ranks.first:
            print(f"encode: {result.counts}")
            require_unchanged(params, "encode", encode_params)
            write_json(metrics, result.figures)


if __name__ == "__main__":
    run(main)
