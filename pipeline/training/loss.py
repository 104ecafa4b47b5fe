"""The training loss: cross-entropy and doubly stochastic attention regularization.

Shapes: `B` images, `K` captions per image, `T` words, `P` regions, `V` vocabulary size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.captions.vocabulary import PAD
from pipeline.training.output_layer import chunked_cross_entropy, chunked_predictions, needs_chunks


def count_targets(targets: Tensor) -> Tensor:
    """Count the words, `<end>` included, and the captions of target ids [B, K, T].

    Padding and captions of padding alone are not counted.

    Returns:
        Number of words and number of captions [2].
    """
    mask = targets != PAD  # [B, K, T]
    return torch.stack([mask.sum(), mask.any(dim=2).sum()])


class Loss(NamedTuple):
    """Terms of the loss of one batch, as sums.

    An optimizer step can accumulate several batches, so `total` normalizes the sums by the counts of the whole step.
    """

    cross_entropy: Tensor
    """Sum over words, in nats."""
    smoothed_cross_entropy: Tensor
    """Sum over words against smoothed targets, in nats."""
    doubly_stochastic: Tensor
    """Sum over captions of the mean over regions of (1 - alpha summed over words) squared."""
    counts: Tensor
    """Number of words and captions of the batch [2], from `count_targets`."""

    def total(self, counts: Tensor, doubly_stochastic_weight: float) -> Tensor:
        """Return this batch's share of the loss of an optimizer step.

        Args:
            counts: Number of words and captions of the whole step [2].
            doubly_stochastic_weight: Weight of the doubly stochastic term.
        """
        num_words, num_captions = counts[0], counts[1]
        return (
            self.smoothed_cross_entropy / num_words + doubly_stochastic_weight * self.doubly_stochastic / num_captions
        )


def caption_loss(
    logits: Tensor, alpha: Tensor, targets: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Loss:
    """Compute cross-entropy and the doubly stochastic term (Xu et al. 2015, section 4.2.1, equation 14).

    The paper sums the second term over regions. Here it is a mean, so that its weight has the same effect on every
    grid size.

    Args:
        logits: Logits of the next word [B, K, T, V].
        alpha: Attention weights [B, K, T, P].
        targets: Ids of the next words [B, K, T]; `<pad>` is ignored.
        label_smoothing: Probability mass spread evenly over the vocabulary (Szegedy et al. 2016). Must be 0 with
            `weights`.
        weights: Factor of each caption in the smoothed cross-entropy [B, K]; None for 1.
    """
    mask = targets != PAD  # [B, K, T]
    flat_logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 2)  # [B * K * T, V]
    if weights is not None:
        words = F.cross_entropy(flat_logits, targets.flatten(), ignore_index=PAD, reduction="none").view_as(targets)
        cross_entropy = words.sum()
        smoothed = (words.sum(dim=2) * weights).sum()
    elif label_smoothing:
        log_probs = flat_logits.log_softmax(dim=-1)
        cross_entropy = F.nll_loss(log_probs, targets.flatten(), ignore_index=PAD, reduction="sum")
        uniform = -(log_probs.mean(dim=-1) * mask.flatten()).sum()
        smoothed = (1 - label_smoothing) * cross_entropy + label_smoothing * uniform
    else:
        smoothed = cross_entropy = F.cross_entropy(flat_logits, targets.flatten(), ignore_index=PAD, reduction="sum")
    return Loss(cross_entropy, smoothed, _doubly_stochastic(alpha, mask), count_targets(targets))


def projected_caption_loss(
    outputs: Tensor,
    output_proj: nn.Linear,
    alpha: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Loss:
    """Compute `caption_loss` from the inputs of the output layer, in chunks if the vocabulary is large.

    Autocast applies to the output layer alone.

    Args:
        outputs: Inputs of the output layer [B, K, T, O].
        output_proj: The output layer.
        alpha: As for `caption_loss`.
        targets: As for `caption_loss`.
        label_smoothing: As for `caption_loss`.
        weights: As for `caption_loss`.
    """
    if not needs_chunks(outputs, output_proj):
        logits = output_proj(outputs)  # [B, K, T, V]
        with torch.autocast(outputs.device.type, enabled=False):
            return caption_loss(logits, alpha, targets, label_smoothing, weights)
    mask = targets != PAD  # [B, K, T]
    word_weights = mask.float() if weights is None else weights.unsqueeze(-1).expand(targets.shape).float()
    cross_entropy, smoothed = chunked_cross_entropy(
        outputs[mask], output_proj, targets[mask], label_smoothing, word_weights[mask]
    )
    with torch.autocast(outputs.device.type, enabled=False):
        return Loss(cross_entropy, smoothed, _doubly_stochastic(alpha, mask), count_targets(targets))


def predict_words(outputs: Tensor, output_proj: nn.Linear, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropy, in nats, and the most likely words [B, K, T], of any id at padding.

    Args:
        outputs: Inputs of the output layer [B, K, T, O].
        output_proj: The output layer.
        targets: Ids of the next words [B, K, T]; `<pad>` is ignored.
    """
    if not needs_chunks(outputs, output_proj):
        logits = output_proj(outputs)  # [B, K, T, V]
        cross_entropy = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=PAD, reduction="sum")
        return cross_entropy, logits.argmax(dim=-1)
    mask = targets != PAD  # [B, K, T]
    predicted = torch.full_like(targets, PAD)
    cross_entropy, predicted[mask] = chunked_predictions(outputs[mask], output_proj, targets[mask])
    return cross_entropy, predicted


def _doubly_stochastic(alpha: Tensor, mask: Tensor) -> Tensor:
    """Sum the doubly stochastic term of alpha [B, K, T, P] over captions; `mask` [B, K, T] is false at padding."""
    attended = (alpha * mask.unsqueeze(-1)).sum(dim=2)  # [B, K, P]
    return ((1 - attended).square().mean(dim=-1) * mask.any(dim=2)).sum()


def sum_attention_entropy(alpha: Tensor, targets: Tensor) -> Tensor:
    """Sum the entropy of the attention weights [B, K, T, P] over the words of targets [B, K, T], in nats."""
    entropy: Tensor = torch.special.entr(alpha).sum(dim=-1)  # [B, K, T]
    return (entropy * (targets != PAD)).sum()
