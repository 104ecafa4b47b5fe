"""Additive attention energies without their large intermediate.

Shapes: `B` images, `K` captions an image (or beams), `P` regions, `A` attention.

The textbook holds [B, K, P, A] numbers for every word until the backward pass; at 196 regions reading and writing them
takes most of the time. Here a few images at a time are compared in a buffer that fits the processor's cache, and the
backward pass compares them again.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

CACHED_NUMBERS = 1 << 18
"""Size of the buffer on a CPU: 1 MB in float32."""


def energies(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    """Compare states with regions: weight . relu(key + query) for each pair.

    Takes keys [B, P, A], queries [B, K, A] and weights [A]; returns [B, K, P].
    """
    compared: Tensor = _Energies.apply(keys, query, weight)  # type: ignore[no-untyped-call]
    return compared


def compiled_energies(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    """`energies`, to rounding, by compiled loops that hold nothing between: faster once they are compiled."""
    compared: Tensor = _CompiledEnergies.apply(keys, query, weight)  # type: ignore[no-untyped-call]
    return compared


class _CompiledEnergies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(keys, query, weight)
        found: Tensor = _compiled(_forward)(keys, query, weight)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, query, weight = ctx.saved_tensors
        found: tuple[Tensor, Tensor, Tensor] = _compiled(_backward)(keys, query, weight, gradients[0])
        return found


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _forward(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    compared = _widened(keys.unsqueeze(1) + query.unsqueeze(2)).relu()
    return (compared * weight).sum(dim=-1).to(keys.dtype)


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _backward(keys: Tensor, query: Tensor, weight: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    compared = _widened(keys.unsqueeze(1) + query.unsqueeze(2))
    wanted = _widened(wanted).unsqueeze(-1)
    passed = torch.where(compared > 0, wanted, 0.0)
    for_weight = (compared * passed).sum(dim=(0, 1, 2))
    return (passed.sum(dim=1) * weight).to(keys.dtype), (passed.sum(dim=2) * weight).to(query.dtype), for_weight


class _Energies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(keys, query, weight)
        found = keys.new_empty(*query.shape[:2], keys.shape[1])
        for part, buffer in _parts(keys, query):
            _compare(keys[part], query[part], buffer)
            found[part] = buffer @ weight
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, query, weight = ctx.saved_tensors
        (wanted,) = gradients  # [B, K, P]
        for_keys, for_query = torch.empty_like(keys), torch.empty_like(query)
        for_weight = torch.zeros_like(weight)
        for part, buffer in _parts(keys, query):
            _compare(keys[part], query[part], buffer)
            for_weight += wanted[part].flatten() @ buffer.flatten(0, 2)
            # What is left of a rectified number under `sign` is its derivative: 1 where it was positive, else 0.
            buffer.sign_().mul_(wanted[part].unsqueeze(-1))
            torch.sum(buffer, dim=1, out=for_keys[part])
            torch.sum(buffer, dim=2, out=for_query[part])
        return for_keys.mul_(weight), for_query.mul_(weight), for_weight


def _compare(keys: Tensor, query: Tensor, buffer: Tensor) -> None:
    torch.add(keys.unsqueeze(1), query.unsqueeze(2), out=buffer).relu_()


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
