"""Matrix products of float32 on a CPU by oneDNN.

For float32, PyTorch calls MKL, which reaches a smaller share of the multiply-adds of AMD's processors than oneDNN does,
the library of PyTorch's convolutions and bfloat16 products. The results are equal up to rounding. Other types, devices
and autocast use PyTorch's own products, as do small products: oneDNN copies the weight, which takes longer than a
product with few rows, and a small weight stays in the processor's cache, where MKL is as fast.

Shapes: `I` input features, `O` output features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIN_ROWS = 64
"""Minimum rows of the inputs for oneDNN."""
SMALL_WEIGHT_SIZE = 1 << 19
"""Elements of a weight, 2 MB, up to which PyTorch's products are used. No weight of the default decoder has more."""


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Project inputs [..., I] to [..., O]."""
        return linear(inputs, self.weight, self.bias)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `inputs @ weight.T + bias`, as `torch.nn.functional.linear` does.

    Args:
        inputs: Inputs [..., I].
        weight: Weight [O, I].
        bias: Bias [O], or None.

    Returns:
        Outputs [..., O].
    """
    if not _uses_onednn(inputs, weight.numel(), inputs.numel() // inputs.shape[-1]):
        return F.linear(inputs, weight, bias)
    # The function gets rows: a view that it made itself could not be changed in place.
    outputs: Tensor = _Linear.apply(inputs.flatten(0, -2), weight, bias)  # type: ignore[no-untyped-call]
    return outputs.view(*inputs.shape[:-1], len(weight))


class ConstantWeight:
    """A weight for `multiply` that many products use and that needs no gradient."""

    def __init__(self, weight: Tensor, num_rows: int) -> None:
        """Copy the weight to the layout of oneDNN, once for all products.

        Args:
            weight: Weight that all images share [I, O], or one for each image [B, I, O].
            num_rows: Rows of the inputs to each product, over all images.
        """
        self._weight = weight.detach()
        self._packed: tuple[Tensor, Tensor] | None = None
        if weight.dim() == 2 and _uses_onednn(weight, weight.numel(), num_rows):
            self._packed = (_pack(self._weight.T, num_rows), _pack(self._weight, num_rows))

    def multiply(self, inputs: Tensor) -> Tensor:
        """Return the product of inputs [B, K, I] and the weight [B, K, O]."""
        if self._packed is None:
            return inputs @ self._weight
        outputs: Tensor = _PackedProduct.apply(inputs.flatten(0, -2), *self._packed)  # type: ignore[no-untyped-call]
        return outputs.view(*inputs.shape[:-1], outputs.shape[-1])


def constant_linear(layer: nn.Linear, num_rows: int) -> Callable[[Tensor], Tensor]:
    """Return the function of a layer for many products that need no gradient.

    Args:
        layer: The layer, whose weight is copied to the layout of oneDNN once for all products.
        num_rows: Rows of the inputs to each product.
    """
    weight = layer.weight.detach()
    if not _uses_onednn(weight, weight.numel(), num_rows):
        return layer
    return partial(_multiply, weight=_pack(weight, num_rows), bias=layer.bias)


def multiply(inputs: Tensor, weight: Tensor | ConstantWeight) -> Tensor:
    """Return the product of inputs [B, K, I] and a weight, [I, O] or one for each image [B, I, O]: [B, K, O]."""
    if isinstance(weight, ConstantWeight):
        return weight.multiply(inputs)
    return linear(inputs, weight.T) if weight.dim() == 2 else inputs @ weight


def weight_gradient(inputs: Tensor, grad_outputs: Tensor) -> Tensor:
    """Return the gradient [O, I] of a weight from inputs [N, I] and gradients of the outputs [N, O]."""
    if not _uses_onednn(inputs, inputs.shape[1] * grad_outputs.shape[1], len(inputs)):
        return grad_outputs.T @ inputs
    return _multiply(grad_outputs.T, inputs.T)


def _uses_onednn(tensor: Tensor, weight_size: int, num_rows: int) -> bool:
    """Whether oneDNN computes the product of a weight and inputs with the device and type of a tensor."""
    return (
        num_rows >= MIN_ROWS
        and weight_size > SMALL_WEIGHT_SIZE
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )


def _multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `inputs @ weight.T + bias` by oneDNN, where the weight may be a result of `_pack`."""
    outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return outputs


def _pack(weight: Tensor, num_rows: int) -> Tensor:
    """Copy a weight [O, I] to the layout of oneDNN for products with `num_rows` rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), num_rows)
    return packed


class _Linear(torch.autograd.Function):
    """`linear` of inputs [N, I] by oneDNN."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return _multiply(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        (grad_output,) = grad_outputs  # [N, O]
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _multiply(grad_output, weight.T) if needs_inputs else None,
            _multiply(grad_output.T, inputs.T) if needs_weight else None,
            grad_output.sum(dim=0) if needs_bias else None,
        )


class _PackedProduct(torch.autograd.Function):
    """Product of inputs [N, I] with a constant weight, packed for the forward and for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, transposed_weight: Tensor) -> Tensor:
        ctx.transposed_weight = transposed_weight
        return _multiply(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _multiply(grad_outputs[0], ctx.transposed_weight), None, None
