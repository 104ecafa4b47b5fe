"""The decoder against the equations of the paper, in float64."""

import pytest
import torch
from torch import Tensor

from pipeline.decoder.soft_attention import (
    Dropout,
    ProjectedRegions,
    RegionFeatures,
    SoftAttentionDecoder,
    position_encoding,
)
from pipeline.training.loss import caption_loss
from tests.factories import decoder_params

B, K, T, P, C, V = 3, 2, 4, 9, 8, 11
SIDE = 3
MANY_STEPS = P + 1
"""Decoding steps per image for which `prepare` projects the regions."""


def build_decoder(size: int = 5) -> SoftAttentionDecoder:
    """Build a decoder whose attention, hidden and embedding sizes are `size`, `size + 1` and `size + 2`."""
    torch.manual_seed(1)
    params = decoder_params(embedding_size=size + 2, hidden_size=size + 1, attention_size=size)
    return SoftAttentionDecoder(params, (SIDE, SIDE), C, V).double()


def example_batch(caption_length: int = T) -> tuple[Tensor, Tensor]:
    """Grids [B, P, C] and tokens [B, K, T]."""
    generator = torch.Generator().manual_seed(2)
    grids = torch.rand(B, P, C, generator=generator, dtype=torch.float64)
    return grids, torch.randint(0, V, (B, K, caption_length), generator=generator)


def follow_equations(model: SoftAttentionDecoder, grid: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and alpha [T, P] of one caption [T] of one grid [P, C], one region and one gate at a time."""
    split_sizes = [model.key_proj.out_features, 1, 1, 4 * model.init_h.out_features]
    query_h, beta_h, coverage_h, gates_h = model.state_proj.weight.split(split_sizes)
    query_y, beta_y, coverage_y, gates_y = model.word_proj.weight.split(split_sizes)
    query_b, beta_b, coverage_b, gates_b = model.state_proj.bias.split(split_sizes)
    regions = [
        torch.cat([(region - region.mean()) / torch.sqrt(region.var(correction=0) + 1e-5), position])
        for region, position in zip(grid, position_encoding(SIDE, SIDE).double(), strict=True)
    ]
    mean = torch.stack(regions).mean(0)
    h, c = torch.tanh(model.init_h(mean)), torch.tanh(model.init_c(mean))
    coverage = torch.zeros(P, dtype=torch.float64)
    logits, alphas = [], []
    for token in tokens:
        y = model.embedding.weight[token]
        query = query_h @ h + query_y @ y + query_b
        e = torch.stack([(model.score_weight * torch.relu(model.key_proj(a) + query)).sum() for a in regions])
        alpha = (e + (coverage_h @ h + coverage_y @ y + coverage_b) * coverage).softmax(0)
        coverage = coverage + alpha
        beta = torch.sigmoid(beta_h @ h + beta_y @ y + beta_b)
        z = beta * sum(weight * a for weight, a in zip(alpha, regions, strict=True))
        i, f, g, o = (gates_y @ y + gates_h @ h + gates_b + model.context_proj.weight @ z).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        deep_output = torch.tanh(y + model.state_output(h) + model.context_output.weight @ z)
        logits.append(model.output_proj(deep_output))
        alphas.append(alpha)
    return torch.stack(logits), torch.stack(alphas)


@pytest.mark.parametrize("caption_length", [T, MANY_STEPS])
def test_forward_follows_the_equations(caption_length: int) -> None:
    model, (grids, tokens) = build_decoder(), example_batch(caption_length)
    logits, alpha = model(grids, tokens)
    for b in range(B):
        for k in range(K):
            expected_logits, expected_alpha = follow_equations(model, grids[b], tokens[b, k])
            torch.testing.assert_close(logits[b, k], expected_logits, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(alpha[b, k], expected_alpha, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("caption_length", [T, MANY_STEPS])
def test_gradients_follow_the_equations(caption_length: int) -> None:
    model, (grids, tokens) = build_decoder(), example_batch(caption_length)
    logits, alpha = model(grids, tokens)
    loss = caption_loss(logits, alpha, tokens)
    loss.total(loss.counts, 0.5).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    outputs = [[follow_equations(model, grids[b], tokens[b, k]) for k in range(K)] for b in range(B)]
    logits = torch.stack([torch.stack([logits for logits, _ in row]) for row in outputs])
    alpha = torch.stack([torch.stack([alpha for _, alpha in row]) for row in outputs])
    loss = caption_loss(logits, alpha, tokens)
    loss.total(loss.counts, 0.5).backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("num_steps", "form"), [(P, RegionFeatures), (MANY_STEPS, ProjectedRegions)])
@pytest.mark.parametrize("project_vocabulary", [False, True])
def test_decode_steps_equal_forward(num_steps: int, form: type, project_vocabulary: bool) -> None:
    model, (grids, tokens) = build_decoder(), example_batch()
    logits, alphas = model(grids, tokens)
    images = model.prepare(grids, num_steps)
    assert type(images) is form
    state = model.init_state(images, K)
    word_projection = model.project_vocabulary() if project_vocabulary else None
    for t in range(T):
        step_logits, state, alpha = model.decode_step(tokens[:, :, t], state, images, word_projection)
        torch.testing.assert_close(step_logits, logits[:, :, t])
        torch.testing.assert_close(alpha, alphas[:, :, t])
    torch.testing.assert_close(state.coverage, alphas.sum(dim=2))


@pytest.mark.parametrize("num_steps", [P, MANY_STEPS])
def test_selected_images_decode_like_all_images(num_steps: int) -> None:
    model, (grids, tokens) = build_decoder(), example_batch()
    index = torch.tensor([2, 0])
    images = model.prepare(grids, num_steps)
    expected, *_ = model.decode_step(tokens[:, :, 0], model.init_state(images, K), images)
    selected = images.select_images(index)
    assert type(selected) is type(images)
    logits, *_ = model.decode_step(tokens[index, :, 0], model.init_state(selected, K), selected)
    torch.testing.assert_close(logits, expected[index])


def test_attention_is_a_distribution_over_regions() -> None:
    model, (grids, tokens) = build_decoder(), example_batch()
    _, alpha = model(grids, tokens)
    assert alpha.min() > 0
    torch.testing.assert_close(alpha.sum(-1), torch.ones(B, K, T, dtype=torch.float64))


def test_logits_depend_neither_on_other_captions_nor_on_later_words() -> None:
    model, (grids, tokens) = build_decoder(), example_batch()
    logits, _ = model(grids, tokens)
    logits_alone, _ = model(grids[1:2], tokens[1:2, :1, :2])
    torch.testing.assert_close(logits_alone[0, 0], logits[1, 0, :2])


def test_float16_grids_give_float32_logits() -> None:
    grids, tokens = example_batch()
    logits, _ = build_decoder().float()(grids.half(), tokens)
    assert logits.dtype == torch.float32


def test_bfloat16_autocast_approximates_float32() -> None:
    model = build_decoder(64).float()
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


def test_dropout_zeroes_with_probability_p_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropout, values = Dropout(0.3), torch.ones(200, 500, requires_grad=True)
    dropped = dropout(values)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped)
    assert dropout.eval()(values) is values


def test_position_encodings_are_distinct_and_closer_for_closer_regions() -> None:
    encoding = position_encoding(7, 5)
    distances = torch.cdist(encoding, encoding)
    assert distances.shape == (35, 35)
    assert (distances + 9 * torch.eye(35)).min() > 0.3
    assert distances[0, 1] < distances[0, 2] < distances[0, 34]
