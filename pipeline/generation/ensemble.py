"""Captions from grids: one decoder, or several that vote, driven by the search.

Shapes: `B` images, `W` beams, `P` regions, `C` channels, `V` words known.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.decoder.model_io import CONFIG_FILE, TrainedModel, read_model
from pipeline.decoder.soft_attention import DecoderState, EncodedImages, SoftAttentionDecoder
from pipeline.errors import UserError
from pipeline.generation.search import Hypothesis, SearchParams, pick_beams, search

_USUAL_WORDS = 12
"""How many a caption has, about; what is prepared once an image depends on how often it will be looked at."""


def caption(
    decoders: Sequence[SoftAttentionDecoder],
    grids: Tensor,
    image_ids: Sequence[int],
    params: SearchParams,
    asked: Sequence[Tensor] | None = None,
) -> list[list[Hypothesis]]:
    """Caption grids [B, P, C] with decoders in evaluation mode; returns each image's captions, the best first.

    Of several decoders, which share a vocabulary, the probabilities of words are averaged, and so is their attention.
    With the seed, an image's id alone decides what is drawn for it; a beam search takes no notice of ids. To caption
    many batches faster, give what `read_ahead` makes of the decoders.
    """
    assert not any(decoder.training for decoder in decoders), "dropout would make captions random"
    voters = Ensemble(decoders, [None] * len(decoders) if asked is None else asked)
    with torch.inference_mode(), _arithmetic(params, grids.device):
        return search(voters, voters.start(grids, params), image_ids, params, grids.device)


def precompute(decoders: Sequence[SoftAttentionDecoder], params: SearchParams) -> list[Tensor]:
    """What every word asks of each decoder's state, known before there are images."""
    with torch.inference_mode(), _arithmetic(params, decoders[0].score_weight.device):
        return [decoder.project_vocabulary() for decoder in decoders]


def _arithmetic(params: SearchParams, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=params.precision == "bfloat16")


class _View(NamedTuple):
    """What one decoder sees and remembers."""

    regions: EncodedImages
    state: DecoderState


class Ensemble:
    """Decoders that choose each word together."""

    def __init__(self, decoders: Sequence[SoftAttentionDecoder], asked: Sequence[Tensor | None]) -> None:
        self._decoders = decoders
        self._asked = asked

    def start(self, grids: Tensor, params: SearchParams) -> list[_View]:
        captions = params.beam_size if params.method == "beam" else params.n_best
        looked = [decoder.prepare(grids, captions * _USUAL_WORDS) for decoder in self._decoders]
        return [_View(own, decoder.init_state(own, 1)) for decoder, own in zip(self._decoders, looked, strict=True)]

    def step(self, words: Tensor, views: list[_View]) -> tuple[Tensor, list[_View], Tensor]:
        steps = [
            decoder.decode_step(words, view.state, view.regions, asked)
            for decoder, view, asked in zip(self._decoders, views, self._asked, strict=True)
        ]
        views = [view._replace(state=state) for view, (_, state, _) in zip(views, steps, strict=True)]
        if len(steps) == 1:
            return steps[0][0], views, steps[0][2]
        votes = torch.stack([logits.float().log_softmax(dim=-1) for logits, _, _ in steps])
        attention = torch.stack([attention for _, _, attention in steps]).mean(dim=0)
        return votes.logsumexp(dim=0) - math.log(len(steps)), views, attention

    def select_beams(self, views: list[_View], beams: Tensor) -> list[_View]:
        return [
            view._replace(state=DecoderState(*(pick_beams(values, beams) for values in view.state))) for view in views
        ]

    def select_images(self, views: list[_View], images: Tensor) -> list[_View]:
        return [
            _View(view.regions.select_images(images), DecoderState(*(values[images] for values in view.state)))
            for view in views
        ]


def read_models(model: Path, ensemble: Path | None) -> list[TrainedModel]:
    """Read the trained model, and with it those in the folders of `ensemble`, in the order of their names.

    Raises `UserError` where a folder holds no model, or one of another vocabulary or encoder than the first.
    """
    folders = _ensemble_dirs(ensemble) if ensemble else []
    models = [read_model(folder) for folder in [model, *folders]]
    for folder, other in zip(folders, models[1:], strict=True):
        for name, own, wanted in (
            ("vocabulary", other.config.vocabulary_digest, models[0].config.vocabulary_digest),
            ("encoder setting", other.config.encoder_fingerprint, models[0].config.encoder_fingerprint),
            ("view", other.config.view, models[0].config.view),
        ):
            if own != wanted:
                raise UserError(
                    f"{folder}: was trained with {name} {own}, but {model} with {wanted}; models vote only on the same "
                    f"words and features: train it anew on the present ones, or take it out of {ensemble}"
                )
    return models


def _ensemble_dirs(ensemble: Path) -> list[Path]:
    if not ensemble.is_dir():
        raise UserError(f"{ensemble}: is no folder; name one whose folders are models")
    if (ensemble / CONFIG_FILE).is_file():
        raise UserError(f"{ensemble}: is itself a model; name the folder that it lies in, or one with copies of models")
    return sorted(path for path in ensemble.iterdir() if path.is_dir())
