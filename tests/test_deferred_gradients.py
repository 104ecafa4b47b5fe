"""Deferred gradients against those of autograd, and loops that record too few or too many steps."""

import pytest
import torch
from torch import Tensor

from pipeline.decoder.deferred_gradients import DeferredGradients
from pipeline.decoder.products import multiply

T, B, K, H, P = 4, 3, 2, 5, 6


def random_loop() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Addends [T, B, K, H], a shared weight [H, H], a weight of each image [B, P, H] and its inputs [T, B, K, P]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(T, B, K, H), (H, H), (B, P, H), (T, B, K, P)]
    addends, shared, separate, inputs = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return addends.requires_grad_(), shared.requires_grad_(), separate.requires_grad_(), inputs


def test_gradients_equal_those_of_autograd() -> None:
    addends, shared, separate, inputs = random_loop()
    h = expected_h = torch.zeros(B, K, H, dtype=torch.float64)
    for t in range(T):
        expected_h = torch.tanh(addends[t] + expected_h @ shared + inputs[t] @ separate)
    expected = torch.autograd.grad(expected_h.square().sum(), (addends, shared, separate))

    loop = DeferredGradients(addends, shared, separate)
    for t, addend in enumerate(loop.steps()):
        previous_h = h
        h = torch.tanh(addend + multiply(h, loop.weights[0]) + multiply(inputs[t], loop.weights[1]))
        loop.record(previous_h, inputs[t])
    torch.testing.assert_close(h, expected_h)
    torch.testing.assert_close(torch.autograd.grad(h.square().sum(), (addends, shared, separate)), expected)


def test_a_narrower_weight_gets_the_gradient_of_the_last_features() -> None:
    addends, _, _, inputs = random_loop()
    weight = torch.randn(P, 2, dtype=torch.float64, requires_grad=True)
    loop = DeferredGradients(addends, weight)
    total = torch.zeros((), dtype=torch.float64)
    for t, addend in enumerate(loop.steps()):
        product = torch.nn.functional.pad(multiply(inputs[t], loop.weights[0]), (H - 2, 0))
        total = total + (addend + product).square().sum()
        loop.record(inputs[t])
    expected = (addends + torch.nn.functional.pad(inputs @ weight, (H - 2, 0))).square().sum()
    torch.testing.assert_close(total, expected)
    (gradient,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, weight)[0])


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("wrong_step", [0, 1, T - 1])
def test_a_step_that_is_not_recorded_once_raises(wrong_step: int, times: int) -> None:
    addends, shared, _, _ = random_loop()
    loop = DeferredGradients(addends, shared)
    h = torch.zeros(B, K, H, dtype=torch.float64)
    steps = enumerate(loop.steps())
    for t, addend in steps:
        previous_h, h = h, torch.tanh(addend + multiply(h, loop.weights[0]))
        for _ in range(times if t == wrong_step else 1):
            loop.record(previous_h)
        if t == wrong_step:
            break
    with pytest.raises(RuntimeError, match=f"{wrong_step + times} of {wrong_step + 1} steps were recorded"):
        next(steps)


def test_backward_of_an_unfinished_loop_raises() -> None:
    addends, shared, _, _ = random_loop()
    loop = DeferredGradients(addends, shared)
    h = torch.zeros(B, K, H, dtype=torch.float64)
    addend = next(loop.steps())
    loop.record(h)
    loss = (addend + multiply(h, loop.weights[0])).sum()
    with pytest.raises(RuntimeError, match=f"1 of {T} steps were recorded"):
        loss.backward()


def test_a_second_backward_raises() -> None:
    addends, shared, _, _ = random_loop()
    loop = DeferredGradients(addends, shared)
    h = torch.zeros(B, K, H, dtype=torch.float64)
    for addend in loop.steps():
        loop.record(h)
        h = torch.tanh(addend + multiply(h, loop.weights[0]))
    h.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=f"0 of {T} steps were recorded"):
        h.sum().backward()
