"""Stage `generate`: captions of one split, with the attention behind each word."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.captions.records import read_records
from pipeline.decoder.captioning import GenerateParams, caption_images, read_models
from pipeline.decoder.generated import write_generated
from pipeline.device import open_device
from pipeline.errors import run
from pipeline.features.store import FeatureStore
from pipeline.params import load, require_unchanged
from pipeline.publish import fresh_folder, publish


def main(
    params: Annotated[Path, typer.Option(help="Params file; its section `generate` is read.")],
    prepared: Annotated[Path, typer.Option(help="Folder of records, from `prepare`.")],
    features: Annotated[Path, typer.Option(help="Feature store, from `encode`.")],
    model: Annotated[Path, typer.Option(help="Model folder, from `train`.")],
    out: Annotated[Path, typer.Option(help="Folder to publish: captions.json, n_best.json and attention.h5.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", envvar="GRIDCAP_DEVICE")] = "auto",
    images_a_batch: Annotated[int, typer.Option(help="Images captioned together.")] = 64,
) -> None:
    """Caption the images of a split."""
    settings = load(params, "generate", GenerateParams)
    models = read_models(model, settings.ensemble)
    store = FeatureStore(features, fingerprint=models[0].config.encoder_fingerprint)
    image_ids = [record.image_id for record in read_records(prepared, settings.split)]
    captions = caption_images(models, store, image_ids, settings.search, images_a_batch, open_device(device))
    fingerprint = "+".join(one.config.fingerprint for one in models)
    with fresh_folder(out) as folder:
        write_generated(folder, captions, len(image_ids), store.setting.grid, fingerprint)
        require_unchanged(params, "generate", settings)
        publish(folder, out)


if __name__ == "__main__":
    run(main)
