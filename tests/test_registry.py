from typing import get_args

from pipeline.decoder.decoder import DecoderKind
from pipeline.decoder.references import REFERENCES
from pipeline.decoder.registry import DECODERS


def test_every_kind_has_a_decoder_and_a_reference() -> None:
    assert tuple(DECODERS) == tuple(REFERENCES) == get_args(DecoderKind)
    assert len(set(DECODERS.values())) == len(set(REFERENCES.values())) == len(DECODERS)
