"""Captions of image grids, by one decoder or by an ensemble of several.

Shapes: `B` images, `K` captions per image (beams or samples), `P` regions, `C` channels, `V` vocabulary size.
"""

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.decoder.decoder import Decoder, map_state
from pipeline.decoder.encoded_images import EncodedImages
from pipeline.decoder.model_io import CONFIG_FILE, TrainedModel, read_model
from pipeline.errors import UserError
from pipeline.generation.caption import Caption
from pipeline.generation.search import SearchParams, search, select_beams

_TYPICAL_LENGTH = 12
"""Words of a typical caption, to estimate the decoding steps per image for `Decoder.prepare`."""


def caption_grids(
    decoders: Sequence[Decoder],
    words: Sequence[str],
    grids: Tensor,
    image_ids: Sequence[int],
    params: SearchParams,
    word_projections: Sequence[Tensor] | None = None,
) -> list[list[Caption]]:
    """Generate the captions of a batch of images.

    Args:
        decoders: One decoder or an ensemble, in evaluation mode. Members of an ensemble share one vocabulary and may be
            of different kinds; their word probabilities and attention weights are averaged.
        words: The vocabulary, indexed by token id.
        grids: Grids of the images [B, P, C].
        image_ids: Ids of the images, which seed sampling together with `params.seed`. Beam search ignores them.
        params: Search settings.
        word_projections: Result of `precompute`, which speeds up captioning of many batches; None projects the words of
            each step.

    Returns:
        The captions of each image, as `search` returns them.

    Raises:
        UserError: The probabilities of an image's captions are not finite, since its grid or the weights are damaged.
    """
    assert not any(decoder.training for decoder in decoders), "dropout would make captions random"
    ensemble = Ensemble(
        decoders, [None] * len(decoders) if word_projections is None else word_projections, params.guidance_scale
    )
    with torch.inference_mode(), _autocast(params, grids.device):
        results = search(ensemble, ensemble.start(grids, params), image_ids, params, words, grids.device)
    for image_id, captions in zip(image_ids, results, strict=True):
        if not captions or not all(math.isfinite(caption.log_probability) for caption in captions):
            raise UserError(
                f"image {image_id}: the decoder's probabilities are not finite. Check the feature store with"
                " `gridcap inspect --verify`, or train again."
            )
    return results


def precompute(decoders: Sequence[Decoder], params: SearchParams) -> list[Tensor]:
    """Compute each decoder's word projections [V, G], which do not depend on images."""
    with torch.inference_mode(), _autocast(params, next(decoders[0].parameters()).device):
        return [decoder.project_vocabulary() for decoder in decoders]


def _autocast(params: SearchParams, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=params.precision == "bfloat16")


class _MemberState(NamedTuple):
    """State of one decoder of the ensemble."""

    images: EncodedImages
    decoder_state: tuple[Tensor, ...]


class Ensemble:
    """Step function of a search, which averages the word probabilities and attention weights of its decoders.

    With a guidance scale s above 1, a word w has the logit s log p(w | image) + (1 - s) log p(w | blank image): what
    the image adds counts s times (classifier-free guidance; Kornblith et al. 2023, arXiv:2307.16686). The grid of the
    blank image is zero.
    """

    def __init__(
        self, decoders: Sequence[Decoder], word_projections: Sequence[Tensor | None], guidance_scale: float
    ) -> None:
        """Combine decoders.

        Args:
            decoders: One or more decoders, in evaluation mode.
            word_projections: Word projections [V, G] of each decoder, or None to project the words of each step.
            guidance_scale: Guidance scale; 1 disables guidance.
        """
        self._decoders = decoders
        self._word_projections = word_projections
        self._guidance_scale = guidance_scale

    def start(self, grids: Tensor, params: SearchParams) -> list[_MemberState]:
        """Compute the state before the first word, with one beam per image, from grids [B, P, C].

        Returns:
            The state of each decoder; with guidance, followed by its state for a blank image in place of each image.
        """
        num_captions = params.beam_size if params.method == "beam" else params.n_best
        inputs = [grids] if self._guidance_scale == 1 else [grids, torch.zeros_like(grids)]
        encoded = [decoder.prepare(x, num_captions * _TYPICAL_LENGTH) for x in inputs for decoder in self._decoders]
        return [
            _MemberState(images, decoder.init_state(images, 1))
            for images, decoder in zip(encoded, cycle(self._decoders), strict=False)
        ]

    def step(self, tokens: Tensor, state: list[_MemberState]) -> tuple[Tensor, list[_MemberState], Tensor]:
        """Decode one step with every decoder. With several decoders, probabilities and attention are averaged."""
        decoders = cycle(zip(self._decoders, self._word_projections, strict=True))
        outputs = [
            decoder.decode_step(tokens, member.decoder_state, member.images, projection)
            for member, (decoder, projection) in zip(state, decoders, strict=False)
        ]
        state = [
            member._replace(decoder_state=decoder_state)
            for member, (_, decoder_state, _) in zip(state, outputs, strict=True)
        ]
        all_logits = [logits for logits, _, _ in outputs]
        alphas = [alpha for _, _, alpha in outputs[: len(self._decoders)]]
        if len(outputs) == 1:
            return all_logits[0], state, alphas[0]
        logits = _mean_log_probs(all_logits[: len(self._decoders)])  # [B, K, V]
        if self._guidance_scale != 1:
            logits = torch.lerp(_mean_log_probs(all_logits[len(self._decoders) :]), logits, self._guidance_scale)
        return logits, state, torch.stack(alphas).mean(dim=0)

    def select_beams(self, state: list[_MemberState], beam_index: Tensor) -> list[_MemberState]:
        """Return the state of the beams `beam_index` [B, K'] of each image."""
        return [
            member._replace(
                decoder_state=map_state(member.decoder_state, lambda values: select_beams(values, beam_index))
            )
            for member in state
        ]

    def select_images(self, state: list[_MemberState], image_index: Tensor) -> list[_MemberState]:
        """Return the state of the images `image_index` [B']."""
        return [
            _MemberState(
                member.images.select_images(image_index),
                map_state(member.decoder_state, lambda values: values[image_index]),
            )
            for member in state
        ]


def _mean_log_probs(logits: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the mean probability [B, K, V] of decoders with these logits."""
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    log_probs = torch.stack([values.to(dtype).log_softmax(dim=-1) for values in logits])  # [decoders, B, K, V]
    return log_probs.logsumexp(dim=0) - math.log(len(logits))


def read_models(model: Path, ensemble: Path | None) -> list[TrainedModel]:
    """Read a trained model and the additional members of its ensemble.

    Args:
        model: Model folder.
        ensemble: Folder of additional model folders; None without an ensemble.

    Returns:
        The model, then the additional members by name of their folder.

    Raises:
        UserError: A folder is not a model folder, or its model has another vocabulary, encoder or view than the first.
    """
    folders = _ensemble_dirs(ensemble) if ensemble else []
    models = [read_model(folder) for folder in [model, *folders]]
    expected = models[0].config
    for folder, member in zip(folders, models[1:], strict=True):
        for name, actual_value, expected_value in (
            ("vocabulary", member.config.vocabulary_digest, expected.vocabulary_digest),
            ("encoder", member.config.encoder_fingerprint, expected.encoder_fingerprint),
            ("view", member.config.view, expected.view),
        ):
            if actual_value != expected_value:
                raise UserError(
                    f"{folder}: was trained with {name} {actual_value}, but {model} with {expected_value}. Members of"
                    f" an ensemble need the same vocabulary and features. Train it again, or remove it from {ensemble}."
                )
    return models


def read_trained_models(trained: Path, models: Sequence[TrainedModel]) -> list[TrainedModel]:
    """Read the model that the first of some models is a refinement of.

    Args:
        trained: Its folder.
        models: The result of `read_models`.

    Returns:
        `models` with the trained model as the first; empty if the first is not refined.

    Raises:
        UserError: `trained` is not a model folder, or that of another model.
    """
    refinement = models[0].config.refinement
    if refinement is None:
        return []
    model = read_model(trained)
    if model.config.fingerprint != refinement.trained_fingerprint:
        raise UserError(
            f"{trained}: is from training run {model.config.fingerprint}, but the model is a refinement of"
            f" {refinement.trained_fingerprint}. Run `dvc repro refine`."
        )
    return [model, *models[1:]]


def _ensemble_dirs(ensemble: Path) -> list[Path]:
    if not ensemble.is_dir():
        raise UserError(f"{ensemble}: no such folder. Name a folder of model folders.")
    if (ensemble / CONFIG_FILE).is_file():
        raise UserError(f"{ensemble}: is a model folder. Name the folder that contains it.")
    return sorted(path for path in ensemble.iterdir() if path.is_dir())
