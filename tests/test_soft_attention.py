"""Soft attention against the equations of the paper, in float64. `test_decoder.py` tests what all kinds share."""

import pytest
import torch
from torch import Tensor

from pipeline.decoder.encoded_images import position_encoding
from pipeline.decoder.soft_attention import SoftAttentionDecoder
from pipeline.training.loss import caption_loss
from tests.kinds import MANY_STEPS, SIDE, B, K, P, T, example_batch, small_decoder


def build_decoder() -> SoftAttentionDecoder:
    decoder = small_decoder("soft_attention")
    assert isinstance(decoder, SoftAttentionDecoder)
    return decoder


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
