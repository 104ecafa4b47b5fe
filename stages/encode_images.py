"""Stage `encode`: encode every image with the frozen ResNet into the feature store."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import publish_together, write_json
from pipeline.device import DeviceOption, setup_device
from pipeline.errors import run
from pipeline.params import load, load_key, require_unchanged


def main(
    params: Annotated[
        Path, typer.Option(help="Params file with section `encode` and the image folder in section `dataset`.")
    ],
    prepared: Annotated[Path, typer.Option(help="Folder of records, from `prepare`.")],
    out: Annotated[Path, typer.Option(help="Output folder of the feature store.")],
    work: Annotated[Path, typer.Option(help="Folder of finished shards, kept between runs.")],
    metrics: Annotated[Path, typer.Option(help="Output JSON file of metrics.")],
    device: DeviceOption = "auto",
    num_threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads that decode images.")] = os.cpu_count()
    or 1,
) -> None:
    """Encode the images of the dataset. Resumes after an interruption. Runs on many processes under torchrun."""
    # Imported here so that --help is fast.
    from pipeline.captions.records import Policy, read_records
    from pipeline.distributed import init_processes
    from pipeline.features.encoder import EncodeParams
    from pipeline.features.encoding import encode

    encode_params = load(params, "encode", EncodeParams)
    image_dir = load_key(params, "dataset.root", Path) / load_key(params, "dataset.images", str)
    bad_images: Policy = load_key(params, "dataset.bad_images", Policy)
    records = read_records(prepared)
    with (
        init_processes() as processes,
        encode(
            records, image_dir, encode_params, work, setup_device(device), num_threads, processes, bad_images, out
        ) as result,
    ):
        if processes.is_main:
            metrics_file = result.store.with_name("metrics.json")
            write_json(metrics_file, result.metrics)
            require_unchanged(params, "encode", encode_params)
            publish_together({out: result.store, metrics: metrics_file})


if __name__ == "__main__":
    run(main)
