"""Products with fixed matrices inside a loop over words, whose gradients are computed once behind it.

Shapes: `T` words, `B` images, `K` captions an image, `I` and `O` numbers in and out.

Autograd would form a gradient of the matrices, [I, O], for every word and add them up: products of few rows, which
spend their time on reading and writing those sums. Put off until the gradients of all words are known, it is one
product.
"""

from typing import Any

import torch
from torch import Tensor


class DeferredGradients:
    """What is added up at every word of a loop, and the matrices whose products are added to it.

    `summed` is [T, B, K, O]. A matrix is that of a linear layer, [I, o], or each image's own, [B, I, o], and its
    products with rows [B, K, I] are added to the last `o` of the `O` numbers. The products themselves are the caller's,
    with the `matrices` of the loop.
    """

    def __init__(self, summed: Tensor, *matrices: Tensor) -> None:
        # Autocast remembers what it has cast of parameters alone, and would cast these at every word.
        self.matrices = [matrix.detach().to(summed.dtype) for matrix in matrices]
        self._rows: list[list[Tensor]] = [[] for _ in matrices]
        self.summed: Tensor = _Deferred.apply(summed, self._rows, *matrices)  # type: ignore[no-untyped-call]

    def multiplied(self, *rows: Tensor) -> None:
        """Tell what rows were multiplied with each of the matrices at the next word."""
        for earlier, own in zip(self._rows, rows, strict=True):
            earlier.append(own.detach())


class _Deferred(torch.autograd.Function):
    """Hands on what is added up; its gradient and the rows tell the gradients of the matrices."""

    @staticmethod
    def forward(ctx: Any, summed: Tensor, rows: list[list[Tensor]], *matrices: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.shapes = [matrix.shape for matrix in matrices]
        return summed.view_as(summed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients  # [T, B, K, O]
        found = []
        for rows, shape in zip(ctx.rows, ctx.shapes, strict=True):
            inputs, outputs = torch.stack(rows).to(gradient.dtype), gradient[..., -shape[-1] :]
            rows.clear()
            if len(shape) == 2:
                inputs, outputs = inputs.flatten(0, 2), outputs.flatten(0, 2)
            else:
                inputs, outputs = (tensor.transpose(0, 1).flatten(1, 2) for tensor in (inputs, outputs))
            found.append((outputs.mT @ inputs).mT)
        return gradient, None, *found
