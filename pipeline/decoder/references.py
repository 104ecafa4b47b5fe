"""The reference implementation of each kind of decoder, for tests and benchmarks."""

from typing import Any

from pipeline.decoder.adaptive_reference import AdaptiveReference
from pipeline.decoder.decoder import DecoderKind
from pipeline.decoder.decoder_reference import DecoderReference
from pipeline.decoder.soft_attention_reference import SoftAttentionReference
from pipeline.decoder.top_down_reference import TopDownReference

REFERENCES: dict[DecoderKind, type[DecoderReference[Any]]] = {
    "soft_attention": SoftAttentionReference,
    "top_down": TopDownReference,
    "adaptive": AdaptiveReference,
}
