"""Model folders with random weights, for tests that need no trained model."""

from pathlib import Path

import torch

from pipeline.captions.vocabulary import SPECIALS, Vocabulary
from pipeline.decoder.model_io import ModelConfig, TrainingData, write_model
from pipeline.decoder.soft_attention import SoftAttentionDecoder
from pipeline.features.store import EncoderSpec
from tests.factories import decoder_params, small_spec

SIZES = decoder_params(hidden_size=8)
SPEC = small_spec(grid_width=3, channels=5)
"""Grids of 2 x 3 regions with 5 channels."""


def make_model(
    folder: Path, seed: int, words: str = "a dog runs fast", spec: EncoderSpec = SPEC, view: str = "whole"
) -> Path:
    """Write a model folder whose fingerprint is `run SEED`."""
    vocabulary = Vocabulary((*SPECIALS, *words.split()))
    torch.manual_seed(seed)
    decoder = SoftAttentionDecoder(SIZES, spec.grid, spec.channels, len(vocabulary))
    config = ModelConfig(
        fingerprint=f"run {seed}",
        decoder=SIZES,
        vocabulary_digest=vocabulary.digest,
        encoder=spec,
        encoder_fingerprint=spec.fingerprint,
        view=view,
        data=TrainingData(num_images=1, num_captions=5, num_val_images=1),
        epoch=1,
        selected_by="cider",
        versions={},
    )
    write_model(folder, decoder.state_dict(), vocabulary, config)
    return folder
