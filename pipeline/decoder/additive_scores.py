"""Additive attention energies without their large intermediate.

Shapes: `B` images, `K` captions an image (or beams), `P` regions, `A` attention.

The textbook holds [B, K, P, A] numbers for every word until the backward pass; at 196 regions reading and writing them
takes most of the time. Here a few images at a time are compared in a buffer that fits the processor's cache, and the
backward pass compares them again. Compiled loops hold nothing between.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

CACHED_NUMBERS = 1 << 18
"""Size of the buffer on a CPU: 1 MB in float32."""

_Passed = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes keys, queries and the gradient [B, K, P] of each pair; returns the sums of what the rectifier lets pass, over
captions [B, P, A] and over regions [B, K, A]."""


def additive_scores(keys: Tensor, query: Tensor, weight: Tensor, compiled: bool = False) -> Tensor:
    """Compare states with regions: weight . relu(key + query) for each pair.

    Takes keys [B, P, A], queries [B, K, A] and weights [A]; returns [B, K, P]. With `compiled`, loops that PyTorch
    compiles the first time: the same to rounding, and faster.
    """
    compared: Tensor = _Energies.apply(keys, query, weight, compiled)  # type: ignore[no-untyped-call]
    return compared


class _Energies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, weight: Tensor, compiled: bool) -> Tensor:
        ctx.save_for_backward(keys, query, weight)
        ctx.compiled = compiled
        found: Tensor = (_compiled(_compared) if compiled else _compared_in_parts)(keys, query, weight)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        keys, query, weight = ctx.saved_tensors
        found: tuple[Tensor, ...]
        if ctx.compiled:
            found = _compiled(_gradients)(keys, query, weight, gradients[0], _passed)
        else:
            found = _gradients(keys, query, weight, gradients[0], _passed_in_parts)
        return *found, None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _compared(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    rectified = _widened(keys.unsqueeze(1) + query.unsqueeze(2)).relu()
    return (rectified * weight).sum(dim=-1).to(keys.dtype)


def _gradients(keys: Tensor, query: Tensor, weight: Tensor, wanted: Tensor, passed: _Passed) -> tuple[Tensor, ...]:
    of_keys, of_query = passed(keys, query, wanted)
    # A pair that the rectifier lets pass counts for the weights as key + query: the sums over pairs are there already.
    for_weight = (keys * of_keys).sum(dim=(0, 1)) + (query * of_query).sum(dim=(0, 1))
    return (of_keys * weight).to(keys.dtype), (of_query * weight).to(query.dtype), for_weight


def _passed(keys: Tensor, query: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    passed = torch.where(keys.unsqueeze(1) + query.unsqueeze(2) > 0, _widened(wanted).unsqueeze(-1), 0.0)
    return passed.sum(dim=1), passed.sum(dim=2)


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _compared_in_parts(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    found = keys.new_empty(*query.shape[:2], keys.shape[1])
    for part, buffer in _parts(keys, query):
        torch.add(keys[part].unsqueeze(1), query[part].unsqueeze(2), out=buffer).relu_()
        found[part] = buffer @ weight
    return found


def _passed_in_parts(keys: Tensor, query: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    of_keys, of_query = torch.empty_like(keys), torch.empty_like(query)
    for part, buffer in _parts(keys, query):
        torch.gt(keys[part].unsqueeze(1), -query[part].unsqueeze(2), out=buffer).mul_(wanted[part].unsqueeze(-1))
        torch.sum(buffer, dim=1, out=of_keys[part])
        torch.sum(buffer, dim=2, out=of_query[part])
    return of_keys, of_query


def _parts(keys: Tensor, query: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the images, each with a buffer [b, K, P, A] to compare them in."""
    images, captions, size = query.shape
    regions = keys.shape[1]
    room = CACHED_NUMBERS // (captions * regions * size) if keys.device.type == "cpu" else images
    together = max(1, min(images, room))
    buffer = keys.new_empty(together, captions, regions, size)
    for start in range(0, images, together):
        part = slice(start, min(start + together, images))
        yield part, buffer[: part.stop - part.start]
