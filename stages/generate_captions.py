"""Stage `generate`: caption the images of a split, and record attention and search settings."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import fresh_folder, publish, require_watched
from pipeline.device import DeviceOption, setup_device
from pipeline.errors import run
from pipeline.params import load, require_unchanged


def main(
    params: Annotated[Path, typer.Option(help="Params file with section `generate`.")],
    prepared: Annotated[Path, typer.Option(help="Folder of records, from `prepare`.")],
    features: Annotated[Path, typer.Option(help="Feature store, from `encode`.")],
    trained: Annotated[Path, typer.Option(help="Model folder before refinement, from `train`.")],
    model: Annotated[Path, typer.Option(help="Model folder, from `refine`.")],
    out: Annotated[Path, typer.Option(help="Output folder of captions, attention and search settings.")],
    device: DeviceOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Batch size, in images.")] = 64,
) -> None:
    """Caption the images of a split; where the model is refined, also with the model before refinement."""
    # Imported here so that --help is fast.
    from pipeline.captions.records import empty_split_error, iter_records
    from pipeline.features.store import FeatureStore
    from pipeline.generation.caption_io import write_captions, write_trained_captions
    from pipeline.generation.ensemble import read_models, read_trained_models
    from pipeline.generation.generate import GenerateParams, generate
    from pipeline.generation.search_settings import write_search_settings

    generate_params = load(params, "generate", GenerateParams)
    models = read_models(model, generate_params.ensemble)
    require_watched(generate_params.ensemble, generate_params.ensemble.glob("*/*"))
    store = FeatureStore(features, fingerprint=models[0].config.encoder_fingerprint, verify_reads=True)
    records, skipped_ids = iter_records(prepared, generate_params.split), store.skipped_ids
    image_ids = [record.image_id for record in records if record.image_id not in skipped_ids]
    if not image_ids:
        raise empty_split_error(prepared, generate_params.split, "which generate.split names")
    torch_device = setup_device(device)
    captions = generate(models, store, image_ids, generate_params.search, batch_size, torch_device)
    trained_models = read_trained_models(trained, models)
    fingerprint = "+".join(model.config.fingerprint for model in models)
    with fresh_folder(out) as folder:
        write_captions(folder, captions, len(image_ids), store.spec.grid, fingerprint)
        if trained_models:
            search = generate_params.search
            write_trained_captions(folder, generate(trained_models, store, image_ids, search, batch_size, torch_device))
        write_search_settings(folder, generate_params.search, models[0].config.fingerprint)
        require_unchanged(params, "generate", generate_params)
        publish(folder, out)


if __name__ == "__main__":
    run(main)
