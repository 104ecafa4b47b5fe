"""Every kind of decoder against its reference implementation, in float64."""

import pytest
import torch
from torch import nn

from pipeline.captions.vocabulary import PAD
from pipeline.decoder.decoder import Decoder, DecoderKind
from pipeline.decoder.references import REFERENCES
from pipeline.decoder.registry import build_decoder
from pipeline.training.loss import caption_loss
from tests.factories import decoder_params
from tests.kinds import all_kinds

C, V = 32, 40


def make_decoder(kind: DecoderKind, side: int, **changes: float) -> Decoder:
    torch.manual_seed(3)
    params = decoder_params(kind=kind, embedding_size=24, hidden_size=20, attention_size=16, **changes)
    decoder = build_decoder(params, (side, side), C, V).double()
    if decoder.non_local is not None:
        nn.init.normal_(decoder.non_local.w_z.weight)  # 0 at the start of training
    return decoder


@all_kinds
@pytest.mark.parametrize("side", [3, 5], ids=["fewer regions than steps", "more regions than steps"])
@pytest.mark.parametrize("non_local_size", [0, 6])
def test_loss_and_gradients_equal_the_reference(kind: DecoderKind, side: int, non_local_size: int) -> None:
    decoder = make_decoder(kind, side, non_local_size=non_local_size)
    reference = REFERENCES[kind](decoder)
    grids = torch.rand(4, side**2, C, dtype=torch.float64)
    tokens = torch.randint(PAD + 1, V, (4, 3, 7))
    for i, length in enumerate([7, 4, 6, 2, 5, 7, 3, 7, 6, 0, 4, 5]):
        tokens[i // 3, i % 3, length:] = PAD
    losses = []
    for model in (decoder, reference):
        loss = caption_loss(*model(grids, tokens[:, :, :-1]), tokens[:, :, 1:], label_smoothing=0.1)
        losses.append(loss.total(loss.counts, 0.5))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    gradients = reference.convert_weights({name: parameter.grad for name, parameter in decoder.named_parameters()})
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.requires_grad}
    assert all(name.endswith("lstm.bias_hh") for name in gradients.keys() - expected.keys())
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() < 1e-10 * gradient.norm(), name


@all_kinds
@pytest.mark.parametrize("non_local_size", [0, 6])
def test_outputs_and_steps_equal_those_of_the_decoder(kind: DecoderKind, non_local_size: int) -> None:
    decoder = make_decoder(kind, side=3, non_local_size=non_local_size)
    reference = REFERENCES[kind](decoder)
    grids, tokens = torch.rand(2, 9, C, dtype=torch.float64), torch.randint(V, (2, 1, 5))
    expected_logits, expected_alpha = decoder(grids, tokens)
    logits, alpha = reference(grids, tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(alpha, expected_alpha, rtol=1e-10, atol=1e-12)
    regions = reference.prepare(grids)
    state = reference.init_state(regions)
    for t in range(5):
        step_logits, state, step_alpha = reference.decode_step(tokens[:, 0, t], state, regions)
        torch.testing.assert_close(step_logits, expected_logits[:, 0, t], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(step_alpha, expected_alpha[:, 0, t], rtol=1e-10, atol=1e-12)


@all_kinds
@pytest.mark.parametrize("dropout", ["region_dropout", "word_dropout"])
def test_a_decoder_with_word_or_region_dropout_is_an_error(kind: DecoderKind, dropout: str) -> None:
    with pytest.raises(ValueError, match="neither word dropout nor region dropout"):
        REFERENCES[kind](make_decoder(kind, 3, **{dropout: 0.1}))
