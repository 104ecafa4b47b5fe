"""Initial weights from a trained model (`train.start_from`).

Words are matched by spelling, special tokens included, and the weights of a matched word are copied. Each weight of a
new word is the mean over `<unk>` and all words of the model. Its probability is then at most the mean probability of
those (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html); random weights would give it more than most
words have.

The shapes of the weights tell which belong to words and which read grids: the first dimension of the former is the
vocabulary size, and the size of the latter depends on the number of channels. No kind of decoder has to name them.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from pipeline.artifacts import fingerprint, read_bytes
from pipeline.captions.vocabulary import SPECIALS, UNK, Vocabulary
from pipeline.decoder.decoder import DecoderParams
from pipeline.decoder.model_io import CONFIG_FILE, REMEDY, ModelConfig, WarmStart, read_model
from pipeline.decoder.registry import build_decoder
from pipeline.errors import UserError, summarize
from pipeline.features.store import EncoderSpec
from pipeline.params import shorten
from pipeline.training.trainer import TrainParams

_SIZES = ("kind", "embedding_size", "hidden_size", "attention_size", "non_local_size")
"""The fields of `DecoderParams` that weights depend on."""


def model_digest(folder: Path) -> str:
    """Return a digest of the content of a model folder, whatever its path.

    Raises:
        UserError: The folder has no configuration.
    """
    # It has the digests of weights and vocabulary.
    return fingerprint(config=read_bytes(folder / CONFIG_FILE, REMEDY).decode(errors="replace"))


def initial_weights(
    folder: Path, params: TrainParams, vocabulary: Vocabulary, spec: EncoderSpec
) -> tuple[dict[str, Tensor], WarmStart]:
    """Convert the weights of a trained model to those of a decoder with another vocabulary, and seed PyTorch.

    Args:
        folder: Model folder.
        params: Section `train`: decoder, seed of the weights that are drawn anew, and whether they may be.
        vocabulary: Vocabulary of the decoder.
        spec: Encoder of its grids.

    Returns:
        State dict of the decoder, and what was kept of the model.

    Raises:
        UserError: The folder is not a model folder, or its decoder has another kind or size, or its encoder is another
            one and `params.start_from_grids` refuses that.
    """
    model = read_model(folder)
    _require_same_sizes(folder, model.config.decoder, params.decoder)
    is_other_encoder = model.config.encoder != spec
    if is_other_encoder and params.start_from_grids == "refuse":
        raise _encoder_error(folder, model.config, spec)
    torch.manual_seed(params.seed)
    weights = build_decoder(params.decoder, spec.grid, spec.channels, len(vocabulary)).state_dict()
    of_words, of_grids = _word_weights(params.decoder), _grid_weights(params.decoder)
    row_by_word = {word: row for row, word in enumerate(model.vocabulary.words)}
    rows = torch.tensor([row_by_word.get(word, len(row_by_word)) for word in vocabulary.words])
    for name, tensor in model.decoder.state_dict().items():
        if name in of_words:
            weights[name] = torch.cat([tensor, tensor[UNK:].mean(dim=0, keepdim=True)])[rows]
        elif not (is_other_encoder and name in of_grids):
            weights[name] = tensor
    num_kept = int((rows < len(row_by_word)).sum()) - len(SPECIALS)
    return weights, WarmStart(
        fingerprint=model.config.fingerprint,
        dataset=model.config.dataset,
        encoder_weights=model.config.encoder_weights,
        num_kept_words=num_kept,
        num_new_words=len(vocabulary) - len(SPECIALS) - num_kept,
        num_dropped_words=len(model.vocabulary) - len(SPECIALS) - num_kept,
        new_input_projection=is_other_encoder,
        warm_start=model.config.warm_start,
    )


def _word_weights(params: DecoderParams) -> set[str]:
    """Return the names of the weights that belong to words."""
    shapes = _shapes(params, num_channels=1, vocab_size=1)
    return {name for name, shape in _shapes(params, 1, vocab_size=2).items() if shape != shapes[name]}


def _grid_weights(params: DecoderParams) -> set[str]:
    """Return the names of the weights that read grids."""
    shapes = _shapes(params, num_channels=1, vocab_size=1)
    return {name for name, shape in _shapes(params, num_channels=2, vocab_size=1).items() if shape != shapes[name]}


def _shapes(params: DecoderParams, num_channels: int, vocab_size: int) -> dict[str, torch.Size]:
    """Return the shapes of the weights of a decoder by name."""
    with torch.device("meta"):
        decoder = build_decoder(params, (1, 1), num_channels, vocab_size)
    return {name: tensor.shape for name, tensor in decoder.state_dict().items()}


def _require_same_sizes(folder: Path, model: DecoderParams, params: DecoderParams) -> None:
    faults = [
        f"decoder.{name} is {getattr(model, name)}, but train.decoder.{name} is {getattr(params, name)}"
        for name in _SIZES
        if getattr(model, name) != getattr(params, name)
    ]
    if faults:
        raise UserError(
            f"{folder / CONFIG_FILE}: {summarize(faults, limit=len(_SIZES))}. Change train.decoder to the kind and"
            " sizes of this model, or train.start_from to a model of others."
        )


def _encoder_error(folder: Path, config: ModelConfig, spec: EncoderSpec) -> UserError:
    model, features = asdict(config.encoder), asdict(spec)
    faults = [
        f"encoder.{name} is {shorten(str(model[name]))}, but that of the features is {shorten(str(features[name]))}"
        for name in model
        if model[name] != features[name]
    ]
    return UserError(
        f"{folder / CONFIG_FILE}: {summarize(faults)}. Change section encode to the encoder of this model, or set"
        " train.start_from_grids to adapt, which trains a new input projection."
    )
