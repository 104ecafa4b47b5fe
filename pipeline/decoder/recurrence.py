"""Linear layers inside a loop over words, whose weight gradients are computed once behind it.

Shapes: `T` words, `N` rows (a caption each), `I` and `O` numbers in and out.

Autograd would form a gradient of the weights, [O, I], for every word and add them up: products of few rows, which spend
their time on reading and writing those sums. Put off until the gradients of all words are known, it is one product.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoopedLinear:
    """A linear layer for `words` calls, one a word: the same numbers as calling the layer each time.

    Made anew for every loop. Every call takes rows of one shape, and its result has to be used in what is
    differentiated.
    """

    def __init__(self, layer: nn.Linear, words: int, rows: tuple[int, ...]) -> None:
        self._weight, self._bias = layer.weight.detach(), layer.bias
        kind = layer.weight.device.type
        if torch.is_autocast_enabled(kind):
            # Autocast remembers what it has cast of parameters alone, and would cast this at every word.
            self._weight = self._weight.to(torch.get_autocast_dtype(kind))
        self._inputs: list[Tensor] = []
        self._deferred = None
        if torch.is_grad_enabled() and layer.weight.requires_grad:
            zeros = _Deferred.apply(layer.weight, self._inputs, (words, *rows))  # type: ignore[no-untyped-call]
            if torch.is_autocast_enabled(zeros.device.type):
                zeros = zeros.to(torch.get_autocast_dtype(zeros.device.type))
            self._deferred = iter(zeros.unbind())

    def __call__(self, inputs: Tensor) -> Tensor:
        """Map rows [..., I] to [..., O]."""
        outputs = F.linear(inputs, self._weight, self._bias)
        if self._deferred is None:
            return outputs
        self._inputs.append(inputs.detach())
        summed: Tensor = outputs + next(self._deferred)
        return summed


class _Deferred(torch.autograd.Function):
    """Zeros [T, ..., O], to be added to outputs: their gradient is that of all outputs, and tells the weights'."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, inputs: list[Tensor], rows: tuple[int, ...]) -> Tensor:
        ctx.inputs = inputs
        kind = weight.device.type
        ctx.compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return weight.new_zeros(1).expand(*rows, len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        inputs = torch.stack(ctx.inputs).to(ctx.compute)
        ctx.inputs.clear()
        outputs = gradients[0].to(ctx.compute)
        return (outputs.flatten(0, -2).T @ inputs.flatten(0, -2)).to(gradients[0].dtype), None, None
