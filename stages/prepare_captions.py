"""Stage `prepare`: convert a dataset of any format to one record per image."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import fresh_folder, publish_together, write_json
from pipeline.captions.records import write_records
from pipeline.captions.sources.dataset import DatasetParams, prepare
from pipeline.captions.sources.image_digests import write_image_digest
from pipeline.errors import run
from pipeline.params import load, require_unchanged


def main(
    params: Annotated[Path, typer.Option(help="Params file with section `dataset`.")],
    out: Annotated[Path, typer.Option(help="Output folder of records.jsonl.")],
    image_digest: Annotated[Path, typer.Option(help="Output JSON file of the digest of all images.")],
    metrics: Annotated[Path, typer.Option(help="Output JSON file of metrics.")],
) -> None:
    """Read and check the dataset, and write one record per image, and a digest of the image files."""
    dataset_params = load(params, "dataset", DatasetParams)
    records, counts, md5s = prepare(dataset_params)
    with fresh_folder(out) as folder:
        prepared, digest_file, metrics_file = folder / "prepared", folder / "images.json", folder / "metrics.json"
        write_records(prepared, records)
        write_image_digest(digest_file, md5s)
        write_json(metrics_file, asdict(counts))
        require_unchanged(params, "dataset", dataset_params)
        publish_together({out: prepared, image_digest: digest_file, metrics: metrics_file})


if __name__ == "__main__":
    run(main)
