"""Weight gradients of a recurrent loop, computed by one matrix product per weight after the last step.

Shapes: `T` steps, `B` images, `K` captions per image, `I` input features, `O` output features.

At each step, autograd would compute the gradient of a weight, [I, O], and add it to the sum over the later steps. A
step has few rows, so reading and writing that sum would take most of the time. After the backward pass of all steps,
one product over all T * B * K rows computes the sum directly.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.decoder.products import ConstantWeight, weight_gradient


class DeferredGradients:
    """Weights of a loop whose gradients are computed after the last step.

    Step `t` of the loop computes `addends[t] + inputs @ weight` for each weight, and records the inputs:

        loop = DeferredGradients(addends, weight)
        for addend in loop.steps():
            output = addend + multiply(inputs, loop.weights[0])
            loop.record(inputs)

    The gradient of `weight` follows from the recorded inputs and from the gradient of `addends`.
    """

    def __init__(self, addends: Tensor, *weights: Tensor) -> None:
        """Prepare the loop.

        Args:
            addends: Terms [T, B, K, O] to which the products are added, one for each step.
            weights: Each is either shared by all images, [I, o], or separate for each image, [B, I, o]. The product
                of inputs [B, K, I] and a weight is added to the last `o` of the `O` output features.
        """
        # Cast once: autocast caches its casts of parameters only and would cast these at every step.
        num_rows = addends[0].numel() // addends.shape[-1]
        self.weights = [ConstantWeight(weight.to(addends.dtype), num_rows) for weight in weights]
        """The weights for use inside the loop; autograd does not track them."""
        self._inputs: list[list[Tensor]] = [[] for _ in weights]
        self._addends: Tensor = _Deferred.apply(addends, self._inputs, *weights)  # type: ignore[no-untyped-call]

    def steps(self) -> Iterator[Tensor]:
        """Yield the addend [B, K, O] of each step.

        Raises:
            RuntimeError: A step was not recorded exactly once.
        """
        for step, addend in enumerate(self._addends, start=1):
            yield addend
            _check_recorded(self._inputs, step)

    def record(self, *inputs: Tensor) -> None:
        """Record this step's inputs [B, K, I] to each of the weights."""
        for recorded, tensor in zip(self._inputs, inputs, strict=True):
            recorded.append(tensor.detach())


class _Deferred(torch.autograd.Function):
    """The identity of the addends, whose backward pass computes the gradients of the weights."""

    @staticmethod
    def forward(ctx: Any, addends: Tensor, inputs: list[list[Tensor]], *weights: Tensor) -> Tensor:
        ctx.inputs = inputs
        ctx.shapes = [weight.shape for weight in weights]
        return addends.view_as(addends)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs  # [T, B, K, O]
        _check_recorded(ctx.inputs, len(grad_output))
        grad_weights = []
        for recorded, shape in zip(ctx.inputs, ctx.shapes, strict=True):
            inputs = torch.stack(recorded).to(grad_output.dtype)  # [T, B, K, I]
            outputs = grad_output[..., -shape[-1] :]  # [T, B, K, o]
            recorded.clear()
            if len(shape) == 2:
                gradient = weight_gradient(inputs.flatten(0, 2), outputs.flatten(0, 2)).T  # [I, o]
            else:
                # [B, T * K, ...]
                inputs, outputs = (tensor.transpose(0, 1).flatten(1, 2) for tensor in (inputs, outputs))
                gradient = (outputs.mT @ inputs).mT  # [B, I, o]
            grad_weights.append(gradient)
        return grad_output, None, *grad_weights


def _check_recorded(inputs: list[list[Tensor]], num_steps: int) -> None:
    """Raise `RuntimeError` unless the inputs of `num_steps` steps were recorded for every weight."""
    if any(len(recorded) != num_steps for recorded in inputs):
        raise RuntimeError(
            f"{len(inputs[0])} of {num_steps} steps were recorded. Call `record` once per step and `backward` once."
        )
