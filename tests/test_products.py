"""Products by oneDNN against those of float64, and the products that PyTorch computes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.decoder import products
from pipeline.decoder.decoder import DecoderKind
from pipeline.decoder.products import (
    MIN_ROWS,
    SMALL_WEIGHT_SIZE,
    ConstantWeight,
    Linear,
    constant_linear,
    linear,
    multiply,
    weight_gradient,
)
from pipeline.decoder.registry import DECODERS, build_decoder
from pipeline.params import load
from pipeline.training.trainer import TrainParams
from tests.paths import ROOT

INPUTS, OUTPUTS = 24, 37  # features


@pytest.fixture(autouse=True)
def small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let oneDNN multiply the weights of these tests."""
    monkeypatch.setattr(products, "SMALL_WEIGHT_SIZE", INPUTS * OUTPUTS - 1)


def random_tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def assert_equals_float64(result: Tensor, expected: Tensor, tensors: list[Tensor], doubles: list[Tensor]) -> None:
    """Compare values, and the gradients of a weighted sum of them."""
    torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-4)
    weights = torch.linspace(-1, 1, result.numel()).view_as(result)
    gradients = torch.autograd.grad((result * weights).sum(), tensors)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), doubles)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, MIN_ROWS - 1, MIN_ROWS, 3 * MIN_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_projection_and_its_gradients_equal_those_of_float64(num_rows: int, bias: bool) -> None:
    tensors = random_tensors((num_rows, INPUTS), (OUTPUTS, INPUTS), *([(OUTPUTS,)] if bias else []))
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    assert_equals_float64(linear(*tensors), F.linear(*doubles), tensors, doubles)


def test_inputs_may_have_any_number_of_dimensions_and_any_layout() -> None:
    inputs, weight = random_tensors((3, INPUTS, MIN_ROWS, 2), (INPUTS, OUTPUTS))
    doubles = [tensor.detach().double().requires_grad_() for tensor in (inputs, weight)]
    result = linear(inputs.permute(0, 2, 3, 1), weight.T)
    expected = F.linear(doubles[0].permute(0, 2, 3, 1), doubles[1].T)
    assert_equals_float64(result, expected, [inputs, weight], doubles)


def test_products_can_be_changed_in_place() -> None:
    inputs, weight = random_tensors((2, MIN_ROWS, INPUTS), (OUTPUTS, INPUTS))
    for result in (linear(inputs, weight), multiply(inputs, ConstantWeight(weight.T, num_rows=2 * MIN_ROWS))):
        result[:, 0, 1] = 0.0
        (gradient,) = torch.autograd.grad(result.sum(), inputs)
        torch.testing.assert_close(gradient[0, 0], weight[torch.arange(OUTPUTS) != 1].sum(dim=0))


@pytest.mark.parametrize("shape", [(INPUTS, OUTPUTS), (MIN_ROWS, INPUTS, OUTPUTS)])
def test_a_constant_weight_multiplies_like_the_weight(shape: tuple[int, ...]) -> None:
    inputs, weight = random_tensors((MIN_ROWS, 2, INPUTS), shape)
    doubles = [inputs.detach().double().requires_grad_()]
    expected = doubles[0] @ weight.detach().double()
    constant = ConstantWeight(weight, num_rows=2 * MIN_ROWS)
    assert_equals_float64(multiply(inputs, constant), expected, [inputs], doubles)
    torch.testing.assert_close(multiply(inputs, weight), expected.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, MIN_ROWS, 3 * MIN_ROWS + 1])
def test_a_constant_layer_projects_like_the_layer(num_rows: int) -> None:
    layer, (inputs,) = Linear(INPUTS, OUTPUTS), random_tensors((num_rows, INPUTS))
    project = constant_linear(layer, num_rows)
    for rows in (inputs.detach(), inputs.detach()[: num_rows - 1]):  # the chunks of a batch differ by a row
        torch.testing.assert_close(project(rows), F.linear(rows, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_weight_equals_that_of_float64() -> None:
    inputs, outputs = (tensor.detach() for tensor in random_tensors((2 * MIN_ROWS, INPUTS), (2 * MIN_ROWS, OUTPUTS)))
    expected = (outputs.double().T @ inputs.double()).float()
    torch.testing.assert_close(weight_gradient(inputs, outputs), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_no_layer_of_the_default_decoder_is_large_enough(kind: DecoderKind) -> None:
    """The numerics of the default run depend on this."""
    params = load(ROOT / "params.yaml", "train", TrainParams).decoder
    decoder = build_decoder(replace(params, kind=kind), (8, 8), 256, 1000)
    assert max(parameter.numel() for parameter in decoder.parameters()) <= SMALL_WEIGHT_SIZE


def test_autocast_float64_small_weights_and_few_rows_use_the_products_of_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, ...]] = []
    multiply_by_onednn = products._multiply

    def count(inputs: Tensor, *arguments: Tensor) -> Tensor:
        calls.append(tuple(inputs.shape))
        return multiply_by_onednn(inputs, *arguments)

    monkeypatch.setattr(products, "_multiply", count)
    layer, inputs = Linear(INPUTS, OUTPUTS), torch.randn(MIN_ROWS, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
    assert layer.double()(inputs.double()).dtype == torch.float64
    layer.float()(inputs[1:])
    Linear(INPUTS, OUTPUTS - 1)(inputs)
    assert calls == []
    layer(inputs)
    assert calls == [(MIN_ROWS, INPUTS)]
