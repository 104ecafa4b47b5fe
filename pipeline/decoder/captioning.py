"""Captions from grids: the decoder driven by the search.

Shapes: `B` images, `W` beams, `P` regions, `C` channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.captions.records import Split
from pipeline.decoder.attention import AttentionDecoder, State
from pipeline.decoder.generated import Generated
from pipeline.decoder.saved import SavedModel
from pipeline.decoder.search import Hypothesis, SearchParams, of_beams, search
from pipeline.features.store import FeatureStore
from pipeline.params import section


@section
class GenerateParams:
    """Which images are captioned, and how."""

    split: Split
    """Split whose images are captioned, and then scored."""
    search: SearchParams


@torch.inference_mode()
def caption(decoder: AttentionDecoder, grids: Tensor, params: SearchParams) -> list[list[Hypothesis]]:
    """Caption grids [B, P, C] with a decoder in evaluation mode; returns each image's beams, the best first."""
    assert not decoder.training, "dropout would make captions random"
    regions = decoder.look(grids)

    def step(words: Tensor, state: State) -> tuple[Tensor, State, Tensor]:
        return decoder.step(words, state, regions)

    def choose(state: State, beams: Tensor) -> State:
        return State(*(of_beams(values, beams) for values in state))

    return search(step, choose, decoder.start(regions, 1), len(grids), params, grids.device)


def caption_images(
    model: SavedModel,
    store: FeatureStore,
    image_ids: Sequence[int],
    params: SearchParams,
    images_a_batch: int,
    device: torch.device,
) -> list[Generated]:
    """Find the best caption of each image whose grid the store holds, in the order of `image_ids`."""
    decoder = model.decoder.to(device)
    found = []
    with tqdm(total=len(image_ids), desc="generate", unit="image") as bar:
        for start in range(0, len(image_ids), images_a_batch):
            part = image_ids[start : start + images_a_batch]
            grids = torch.from_numpy(store.grids(part)).to(device)
            for image_id, beams in zip(part, caption(decoder, grids, params), strict=True):
                found.append(_generated(image_id, beams[0], model))
            bar.update(len(part))
    return found


def _generated(image_id: int, best: Hypothesis, model: SavedModel) -> Generated:
    return Generated(
        image_id=image_id,
        words=tuple(model.vocabulary.words[number] for number in best.words),
        log_probability=best.log_probability,
        attention=best.attention.half().numpy(),
    )
