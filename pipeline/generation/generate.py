"""Captions of a whole split: what stage `generate` runs."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline.captions.records import Split
from pipeline.decoder.model_io import TrainedModel
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.generation.caption_io import GeneratedCaptions, RankedCaption
from pipeline.generation.ensemble import caption, precompute
from pipeline.generation.search import Hypothesis, SearchParams
from pipeline.params import params_section


@params_section
class GenerateParams:
    """Which images are captioned, and how."""

    split: Split
    """Split whose images are captioned, and then scored."""
    ensemble: Path
    """Folder of further model folders, whose probabilities are averaged with the trained model's; empty: it alone."""
    search: SearchParams


def generate(
    models: Sequence[TrainedModel],
    store: FeatureStore,
    image_ids: Sequence[int],
    params: SearchParams,
    batch_size: int,
    device: torch.device,
) -> Iterator[GeneratedCaptions]:
    """Caption each image whose grid the store holds, in the order of `image_ids`, batch by batch as they are asked for.

    Of several models, which share vocabulary and encoder setting, the probabilities are averaged. Raises `UserError`
    where the store shows another view of pictures than the models learned from.
    """
    view = models[0].config.view
    if store.views[0] != view:
        raise UserError(
            f"the model was trained on the view '{view}' of pictures, but the store's first is '{store.views[0]}'; put"
            " it first in encode.views of params.yaml, or train anew"
        )
    decoders = [model.decoder.to(device) for model in models]
    words = models[0].vocabulary.words
    asked = precompute(decoders, params)
    with tqdm(total=len(image_ids), desc="generate", unit="image") as bar:
        for start in range(0, len(image_ids), batch_size):
            part = image_ids[start : start + batch_size]
            grids = torch.from_numpy(store.grids(part)).to(device)
            for image_id, found in zip(part, caption(decoders, grids, part, params, asked), strict=True):
                yield GeneratedCaptions(
                    image_id=image_id,
                    captions=tuple(_ranked(one, words) for one in found),
                    attention=found[0].attention.half().numpy(),
                )
            bar.update(len(part))


def _ranked(one: Hypothesis, words: Sequence[str]) -> RankedCaption:
    return RankedCaption(
        words=tuple(words[number] for number in one.words), log_probability=one.log_probability, score=one.score
    )
