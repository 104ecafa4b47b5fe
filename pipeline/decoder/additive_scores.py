"""Additive attention scores (Bahdanau et al. 2015, with ReLU) without the large intermediate tensor.

Shapes: `B` images, `K` captions per image (or beams), `P` regions, `A` attention size.

The direct formula keeps a [B, K, P, A] tensor for every decoding step until the backward pass. With 196 regions,
reading and writing these tensors takes most of a training step. Here the tensor is computed for a few images at a time,
in a buffer that fits into the CPU's cache, and recomputed in the backward pass. The compiled version needs no buffer.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

BUFFER_SIZE = 1 << 18
"""Elements of the buffer on a CPU: 1 MB in float32."""

_ActiveSums = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Type of `_active_sums` and `_active_sums_chunked`."""


def additive_scores(keys: Tensor, query: Tensor, weight: Tensor, compiled: bool = False) -> Tensor:
    """Compute `weight . relu(key + query)` for every pair of a key and a query.

    Args:
        keys: Keys of the regions [B, P, A].
        query: Queries of the captions [B, K, A].
        weight: Weights of the sum over the attention size [A].
        compiled: Use `torch.compile`: faster after the first call, equal up to rounding.

    Returns:
        Scores [B, K, P].
    """
    scores: Tensor = _AdditiveScores.apply(keys, query, weight, compiled)  # type: ignore[no-untyped-call]
    return scores


class _AdditiveScores(torch.autograd.Function):
    """`additive_scores`, which recomputes the activations in the backward pass instead of storing them."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, weight: Tensor, compiled: bool) -> Tensor:
        ctx.save_for_backward(keys, query, weight)
        ctx.compiled = compiled
        scores: Tensor = (_compile(_scores) if compiled else _scores_chunked)(keys, query, weight)
        return scores

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        keys, query, weight = ctx.saved_tensors
        (grad_output,) = grad_outputs  # [B, K, P]
        gradients: tuple[Tensor, ...]
        if ctx.compiled:
            gradients = _compile(_gradients)(keys, query, weight, grad_output, _active_sums)
        else:
            gradients = _gradients(keys, query, weight, grad_output, _active_sums_chunked)
        return *gradients, None


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _scores(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    """Compute the scores [B, K, P] by the direct formula, which `torch.compile` fuses."""
    activations = _at_least_float32(keys.unsqueeze(1) + query.unsqueeze(2)).relu()  # [B, K, P, A]
    return (activations * weight).sum(dim=-1).to(keys.dtype)  # [B, K, P]


def _scores_chunked(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    """Compute the same as `_scores`, a few images at a time."""
    scores = keys.new_empty(*query.shape[:2], keys.shape[1])  # [B, K, P]
    for chunk, buffer in _chunks(keys, query):
        torch.add(keys[chunk].unsqueeze(1), query[chunk].unsqueeze(2), out=buffer).relu_()  # [chunk, K, P, A]
        scores[chunk] = buffer @ weight  # [chunk, K, P]
    return scores


def _gradients(
    keys: Tensor, query: Tensor, weight: Tensor, grad_output: Tensor, active_sums: _ActiveSums
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of keys [B, P, A], query [B, K, A] and weight [A]."""
    key_sum, query_sum = active_sums(keys, query, grad_output)
    # An active pair adds grad_output * (key + query) to the gradient of the weight, so the two sums suffice.
    grad_weight = (keys * key_sum).sum(dim=(0, 1)) + (query * query_sum).sum(dim=(0, 1))
    return (key_sum * weight).to(keys.dtype), (query_sum * weight).to(query.dtype), grad_weight


def _active_sums(keys: Tensor, query: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Sum `grad_output` [B, K, P] over the pairs where the ReLU is active.

    Returns:
        The sum over captions [B, P, A] and the sum over regions [B, K, A].
    """
    active = keys.unsqueeze(1) + query.unsqueeze(2) > 0  # [B, K, P, A]
    active_grad = torch.where(active, _at_least_float32(grad_output).unsqueeze(-1), 0.0)  # [B, K, P, A]
    return active_grad.sum(dim=1), active_grad.sum(dim=2)


def _active_sums_chunked(keys: Tensor, query: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same as `_active_sums`, a few images at a time."""
    key_sum, query_sum = torch.empty_like(keys), torch.empty_like(query)
    for chunk, buffer in _chunks(keys, query):
        torch.gt(keys[chunk].unsqueeze(1), -query[chunk].unsqueeze(2), out=buffer).mul_(
            grad_output[chunk].unsqueeze(-1)
        )
        torch.sum(buffer, dim=1, out=key_sum[chunk])  # [chunk, P, A]
        torch.sum(buffer, dim=2, out=query_sum[chunk])  # [chunk, K, A]
    return key_sum, query_sum


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _chunks(keys: Tensor, query: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the images, each with a buffer [chunk, K, P, A]. On a GPU, one slice covers all images."""
    num_images, num_captions, attention_size = query.shape
    num_regions = keys.shape[1]
    chunk_size = num_images
    if keys.device.type == "cpu":
        chunk_size = max(1, min(num_images, BUFFER_SIZE // (num_captions * num_regions * attention_size)))
    buffer = keys.new_empty(chunk_size, num_captions, num_regions, attention_size)
    for start in range(0, num_images, chunk_size):
        stop = min(start + chunk_size, num_images)
        yield slice(start, stop), buffer[: stop - start]
