"""What every kind of decoder must do, in float64. `test_decoder_reference.py` compares each with its reference."""

import copy

import pytest
import torch
from torch import Tensor

from pipeline.decoder.decoder import Decoder, DecoderKind, map_state
from pipeline.generation.search import select_beams
from pipeline.training.loss import caption_loss
from tests.kinds import MANY_STEPS, B, K, P, T, all_kinds, example_batch, small_decoder


@all_kinds
@pytest.mark.parametrize("num_steps", [P, MANY_STEPS])
@pytest.mark.parametrize("project_vocabulary", [False, True])
def test_decode_steps_equal_forward(kind: DecoderKind, num_steps: int, project_vocabulary: bool) -> None:
    model, (grids, tokens) = small_decoder(kind), example_batch()
    word_projection = model.project_vocabulary() if project_vocabulary else None
    logits, alphas = model(grids, tokens)
    projected_logits, projected_alphas = model(grids, tokens, word_projection)
    torch.testing.assert_close(projected_logits, logits)
    torch.testing.assert_close(projected_alphas, alphas)
    images = model.prepare(grids, num_steps)
    state = model.init_state(images, K)
    for t in range(T):
        step_logits, state, alpha = model.decode_step(tokens[:, :, t], state, images, word_projection)
        torch.testing.assert_close(step_logits, logits[:, :, t])
        torch.testing.assert_close(alpha, alphas[:, :, t])
    torch.testing.assert_close(state.coverage, alphas.sum(dim=2))


@all_kinds
@pytest.mark.parametrize("caption_length", [T, MANY_STEPS])
def test_gradients_equal_those_of_stepping(kind: DecoderKind, caption_length: int) -> None:
    model, (grids, tokens) = small_decoder(kind), example_batch(caption_length)
    gradients = []
    for steps in (model._steps, lambda *inputs: Decoder._steps(model, *inputs)):
        model.zero_grad()
        outputs, alpha = steps(grids, tokens, None)
        loss = caption_loss(model.output_proj(outputs), alpha, tokens)
        loss.total(loss.counts, 0.5).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


@all_kinds
@pytest.mark.parametrize("num_steps", [P, MANY_STEPS])
def test_selected_images_and_beams_decode_like_all(kind: DecoderKind, num_steps: int) -> None:
    model, (grids, tokens) = small_decoder(kind), example_batch()
    images = model.prepare(grids, num_steps)
    _, state, _ = model.decode_step(tokens[:, :, 0], model.init_state(images, K), images)
    expected, *_ = model.decode_step(tokens[:, :, 1], state, images)
    image_index, beam_index = torch.tensor([2, 0]), torch.tensor([[1, 0, 1], [0, 0, 1]])
    state = map_state(map_state(state, lambda values: values[image_index]), lambda v: select_beams(v, beam_index))
    tokens = select_beams(tokens[image_index], beam_index)
    logits, *_ = model.decode_step(tokens[:, :, 1], state, images.select_images(image_index))
    torch.testing.assert_close(logits, select_beams(expected[image_index], beam_index))


@all_kinds
def test_attention_and_sentinel_are_a_distribution(kind: DecoderKind) -> None:
    model, (grids, tokens) = small_decoder(kind), example_batch()
    _, alpha = model(grids, tokens)
    assert alpha.min() > 0
    if kind == "adaptive":
        assert 0.01 < alpha.sum(dim=-1).min() < alpha.sum(dim=-1).max() < 0.99
    else:
        torch.testing.assert_close(alpha.sum(dim=-1), torch.ones(B, K, T, dtype=torch.float64))


@all_kinds
def test_attention_depends_on_the_coverage(kind: DecoderKind) -> None:
    model, (grids, tokens) = small_decoder(kind), example_batch()
    images = model.prepare(grids)
    state = model.init_state(images, K)
    _, _, alpha = model.decode_step(tokens[:, :, 0], state, images)
    covered = state._replace(coverage=torch.eye(P, dtype=torch.float64)[0].expand(B, K, P))
    _, _, covered_alpha = model.decode_step(tokens[:, :, 0], covered, images)
    assert (alpha - covered_alpha)[..., 0].abs().min() > 1e-4


@all_kinds
def test_logits_depend_neither_on_other_captions_nor_on_later_words(kind: DecoderKind) -> None:
    model, (grids, tokens) = small_decoder(kind), example_batch()
    logits, _ = model(grids, tokens)
    logits_alone, _ = model(grids[1:2], tokens[1:2, :1, :2])
    torch.testing.assert_close(logits_alone[0, 0], logits[1, 0, :2])


@all_kinds
def test_float16_grids_give_float32_logits(kind: DecoderKind) -> None:
    grids, tokens = example_batch()
    logits, _ = small_decoder(kind).float()(grids.half(), tokens)
    assert logits.dtype == torch.float32


@all_kinds
def test_bfloat16_autocast_approximates_float32(kind: DecoderKind) -> None:
    model = small_decoder(kind, size=64).float()
    grids, tokens = example_batch()

    def loss_and_gradient() -> tuple[float, Tensor]:
        model.zero_grad()
        loss = caption_loss(*model(grids.float(), tokens), tokens)
        loss.total(loss.counts, 0.5).backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return loss.cross_entropy.item(), torch.cat(gradients)

    expected_loss, expected_gradient = loss_and_gradient()
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = loss_and_gradient()
    assert loss == pytest.approx(expected_loss, rel=0.01)
    assert loss != expected_loss
    assert gradient.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(gradient, expected_gradient, dim=0) > 0.99


@all_kinds
@pytest.mark.parametrize("dropout", ["dropout", "region_dropout", "word_dropout"])
def test_dropout_changes_training_alone(kind: DecoderKind, dropout: str) -> None:
    model, (grids, tokens) = small_decoder(kind, **{dropout: 0.5}), example_batch()
    first, second = model(grids, tokens)[0], model(grids, tokens)[0]
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(grids, tokens)[0], model(grids, tokens)[0])
    torch.testing.assert_close(model(grids, tokens)[0], small_decoder(kind)(grids, tokens)[0])


@all_kinds
def test_a_copy_does_not_share_weights(kind: DecoderKind) -> None:
    """The EMA of the weights is a copy of the decoder."""
    model, (grids, tokens) = small_decoder(kind), example_batch()
    copied = copy.deepcopy(model)
    expected = copied(grids, tokens)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(grids, tokens)[0], expected)
    assert not model(grids, tokens)[0].any()
