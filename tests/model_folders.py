"""Model folders with random weights, for tests that need no trained model."""

from pathlib import Path
from typing import Any

import torch

from pipeline.captions.vocabulary import SPECIALS, Vocabulary
from pipeline.decoder.decoder import DecoderParams
from pipeline.decoder.model_io import ModelConfig, TrainingData, write_model
from pipeline.decoder.registry import build_decoder
from pipeline.features.store import EncoderSpec
from tests.factories import decoder_params, small_spec

SIZES = decoder_params(hidden_size=8)
SPEC = small_spec(grid_width=3, channels=5)
"""Grids of 2 x 3 regions with 5 channels."""


def model_config(**changes: Any) -> ModelConfig:
    """Return the config of a model of the sizes `SIZES` on grids of `SPEC`, with some fields changed."""
    encoder: EncoderSpec = changes.get("encoder", SPEC)
    values: dict[str, Any] = {
        "fingerprint": "f" * 16,
        "decoder": SIZES,
        "vocabulary_digest": "a1b2",
        "encoder": encoder,
        "encoder_fingerprint": encoder.fingerprint,
        "view": "whole",
        "data": TrainingData(num_images=1, num_captions=5, num_val_images=1, num_text_captions=0),
        "epoch": 1,
        "selected_by": "cider",
        "versions": {},
    }
    return ModelConfig(**(values | changes))


def make_model(
    folder: Path,
    seed: int,
    words: str = "a dog runs fast",
    spec: EncoderSpec = SPEC,
    view: str = "whole",
    params: DecoderParams = SIZES,
) -> Path:
    """Write a model folder with random weights.

    Args:
        folder: Folder to write.
        seed: Seed of the weights. The fingerprint of the model is `run SEED`.
        words: Words of the vocabulary, without special tokens.
        spec: Encoder of the grids.
        view: View that the model captions.
        params: Kind and sizes of the decoder.

    Returns:
        The folder.
    """
    vocabulary = Vocabulary((*SPECIALS, *words.split()))
    torch.manual_seed(seed)
    decoder = build_decoder(params, spec.grid, spec.channels, len(vocabulary))
    config = model_config(
        fingerprint=f"run {seed}", decoder=params, vocabulary_digest=vocabulary.digest, encoder=spec, view=view
    )
    write_model(folder, decoder.state_dict(), vocabulary, config)
    return folder
