"""Captions of a split from stored features: stage `generate`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
from tqdm import tqdm

from pipeline.captions.records import Split
from pipeline.decoder.model_io import TrainedModel
from pipeline.device import to_device
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.generation.caption_io import GeneratedCaptions
from pipeline.generation.ensemble import caption_grids, precompute
from pipeline.generation.search import SearchParams
from pipeline.params import DEPENDENCY, params_section


@params_section
class GenerateParams:
    """Section `generate`: which images to caption, and how."""

    split: Split
    """Split to caption and evaluate."""
    ensemble: Annotated[Path, DEPENDENCY]
    """Folder of additional model folders to ensemble with the trained model; empty for none."""
    search: SearchParams


def generate(
    models: Sequence[TrainedModel],
    store: FeatureStore,
    image_ids: Sequence[int],
    params: SearchParams,
    batch_size: int,
    device: torch.device,
) -> Iterator[GeneratedCaptions]:
    """Caption images from stored features, lazily, batch by batch, in the order of `image_ids`.

    Args:
        models: One model, or an ensemble from `read_models`.
        store: Features of the images.
        image_ids: Images to caption.
        params: Search settings.
        batch_size: Images per batch.
        device: Device to decode on.

    Yields:
        The captions of each image, with attention [T, H, W].

    Raises:
        UserError: The first view in the store is not the view that the models were trained on.
    """
    view = models[0].config.view
    if store.views[0] != view:
        raise UserError(
            f"encode.views: the first view of the features is {store.views[0]}, but the model was trained on {view}."
            f" Put {view} first, or train again."
        )
    decoders = [model.decoder.to(device) for model in models]
    vocabulary = models[0].vocabulary
    word_projections = precompute(decoders, params)
    with tqdm(total=len(image_ids), desc="generate", unit="image") as bar:
        for start in range(0, len(image_ids), batch_size):
            batch_ids = image_ids[start : start + batch_size]
            grids = to_device(torch.from_numpy(store.grids(batch_ids)), device)  # [B, P, C]
            results = caption_grids(decoders, vocabulary.words, grids, batch_ids, params, word_projections)
            for image_id, captions in zip(batch_ids, results, strict=True):
                yield GeneratedCaptions(
                    image_id=image_id,
                    captions=tuple(caption.complete(store.spec.grid, vocabulary.language) for caption in captions),
                )
            bar.update(len(batch_ids))
