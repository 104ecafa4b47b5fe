"""Output layer and cross-entropy over a large vocabulary, in chunks of words.

The logits of a batch over 10,000 words do not fit into the caches of a CPU. Here they exist for one chunk at a time,
and not for padding. Training computes their gradients in the forward pass, as the fused cross-entropy of Liger Kernel
does (arXiv:2410.10989).

Shapes: `N` words, `O` input size of the output layer, `V` vocabulary size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.decoder.products import constant_linear

MAX_LOGITS = 2**22
"""Maximum logits of a chunk: 16 MiB in float32."""


def needs_chunks(outputs: Tensor, output_proj: nn.Linear) -> bool:
    """Whether the logits of `outputs` [..., O] are computed in chunks: on a CPU, if they are more than `MAX_LOGITS`."""
    return outputs.device.type == "cpu" and outputs.shape[:-1].numel() * output_proj.out_features > MAX_LOGITS


def chunked_cross_entropy(
    outputs: Tensor, output_proj: nn.Linear, targets: Tensor, label_smoothing: float, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy without all logits at once. Under autocast, products have its precision.

    Args:
        outputs: Inputs of the output layer [N, O].
        output_proj: The output layer.
        targets: Ids of the words [N].
        label_smoothing: Probability mass spread evenly over the vocabulary.
        weights: Factor of each word in the second sum [N].

    Returns:
        Sum of the cross-entropy, without gradient, and weighted sum of that against smoothed targets, in nats.
    """
    sums: tuple[Tensor, Tensor] = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        outputs, output_proj.weight, output_proj.bias, targets, label_smoothing, weights
    )
    return sums


@torch.no_grad()
def chunked_predictions(outputs: Tensor, output_proj: nn.Linear, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropy of the words `targets` [N], in nats, and the most likely words [N].

    Args:
        outputs: Inputs of the output layer [N, O].
        output_proj: The output layer.
        targets: Ids of the words [N].
    """
    cross_entropy = outputs.new_zeros((), dtype=torch.float32)
    predicted = torch.empty_like(targets)
    chunks = list(_chunks(len(targets), output_proj.out_features))
    project = constant_linear(output_proj, len(targets) // len(chunks))
    for rows in chunks:
        logits = project(outputs[rows]).float()  # [n, V]
        cross_entropy += F.cross_entropy(logits, targets[rows], reduction="sum")
        # NumPy's `argmax` takes a tenth of the time of PyTorch's on a CPU.
        predicted[rows] = torch.from_numpy(logits.numpy().argmax(axis=-1))
    return cross_entropy, predicted


def _chunks(num_words: int, vocab_size: int) -> Iterator[slice]:
    """Yield the rows of each chunk; all chunks have nearly the same size."""
    num_chunks = -(-num_words * vocab_size // MAX_LOGITS)
    for chunk in range(num_chunks):
        yield slice(num_words * chunk // num_chunks, num_words * (chunk + 1) // num_chunks)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`chunked_cross_entropy`, whose forward pass computes the gradients of the second sum."""

    @staticmethod
    def forward(
        ctx: Any,
        outputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        label_smoothing: float,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = outputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else outputs.dtype
        vocab_size = len(weight)
        cross_entropy, smoothed = weight.new_zeros(()), weight.new_zeros(())
        grad_outputs, grad_weight, grad_bias = map(torch.zeros_like, (outputs, weight, bias))
        with torch.autocast(device, enabled=False):
            weight, bias = weight.to(dtype), bias.to(dtype)
            for rows in _chunks(len(targets), vocab_size):
                inputs, factors = outputs[rows].to(dtype), weights[rows]  # [n, O], [n]
                target = targets[rows].unsqueeze(-1)  # [n, 1]
                log_probs = (
                    F.linear(inputs, weight, bias).to(torch.promote_types(dtype, torch.float32)).log_softmax(dim=-1)
                )  # [n, V]
                losses = -log_probs.gather(1, target).squeeze(-1)  # [n]
                cross_entropy += losses.sum()
                if label_smoothing:
                    losses = (1 - label_smoothing) * losses - label_smoothing * log_probs.mean(dim=-1)
                smoothed += (losses * factors).sum()
                grad_logits = log_probs.exp_()  # [n, V]
                if label_smoothing:
                    grad_logits -= label_smoothing / vocab_size
                grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, label_smoothing - 1))
                grad_logits *= factors.unsqueeze(-1)
                grad_bias += grad_logits.sum(dim=0)
                grad_logits = grad_logits.to(dtype)
                grad_outputs[rows] = grad_logits @ weight
                if dtype == grad_weight.dtype:
                    grad_weight.addmm_(grad_logits.T, inputs)
                else:
                    grad_weight += grad_logits.T @ inputs
        ctx.save_for_backward(grad_outputs, grad_weight, grad_bias)
        ctx.mark_non_differentiable(cross_entropy)
        return cross_entropy, smoothed

    @staticmethod
    def backward(ctx: Any, *grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        _, grad_smoothed = grad_sums
        # In place: `backward` runs once, and a second copy of the largest weight takes memory.
        grads = [grad.mul_(grad_smoothed) for grad in ctx.saved_tensors]
        return *grads, None, None, None
