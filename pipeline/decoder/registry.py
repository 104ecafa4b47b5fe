"""The kinds of decoders. Adding one: a line here, and its name in `DecoderKind`."""

from collections.abc import Callable

from pipeline.decoder.adaptive import AdaptiveDecoder
from pipeline.decoder.decoder import Decoder, DecoderKind, DecoderParams
from pipeline.decoder.soft_attention import SoftAttentionDecoder
from pipeline.decoder.top_down import TopDownDecoder

DECODERS: dict[DecoderKind, Callable[[DecoderParams, tuple[int, int], int, int], Decoder]] = {
    "soft_attention": SoftAttentionDecoder,
    "top_down": TopDownDecoder,
    "adaptive": AdaptiveDecoder,
}


def build_decoder(params: DecoderParams, grid_size: tuple[int, int], num_channels: int, vocab_size: int) -> Decoder:
    """Build a decoder of the kind `params.kind` with random weights.

    Args:
        params: Kind, sizes and dropout.
        grid_size: Height and width of the grid, in regions.
        num_channels: Channels of the grid, C.
        vocab_size: Vocabulary size, V.
    """
    return DECODERS[params.kind](params, grid_size, num_channels, vocab_size)
