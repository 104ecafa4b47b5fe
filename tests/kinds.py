"""Small decoders of every kind, and a batch for them."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from pipeline.captions.vocabulary import PAD
from pipeline.decoder.decoder import Decoder, DecoderKind
from pipeline.decoder.registry import build_decoder
from tests.factories import decoder_params

KINDS: tuple[DecoderKind, ...] = get_args(DecoderKind)
OTHER_KINDS = [kind for kind in KINDS if kind != "soft_attention"]

all_kinds = pytest.mark.parametrize("kind", KINDS)
all_kinds_exhaustively = pytest.mark.parametrize(
    "kind", ["soft_attention", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in OTHER_KINDS)]
)
"""As `all_kinds`, for slow tests."""

B, K, T, C, V = 3, 2, 4, 8, 11
SIDE = 3
P = SIDE**2
MANY_STEPS = P + 1
"""Decoding steps per image for which `prepare` projects the regions."""


def small_decoder(kind: DecoderKind, size: int = 5, **changes: object) -> Decoder:
    """Build a decoder in float64 whose attention, hidden and embedding sizes are `size`, `size + 1` and `size + 2`."""
    torch.manual_seed(1)
    sizes = {"embedding_size": size + 2, "hidden_size": size + 1, "attention_size": size}
    return build_decoder(decoder_params(kind=kind, **(sizes | changes)), (SIDE, SIDE), C, V).double()


def example_batch(caption_length: int = T) -> tuple[Tensor, Tensor]:
    """Return grids [B, P, C] and tokens [B, K, T] without padding."""
    generator = torch.Generator().manual_seed(2)
    grids = torch.rand(B, P, C, generator=generator, dtype=torch.float64)
    return grids, torch.randint(PAD + 1, V, (B, K, caption_length), generator=generator)
