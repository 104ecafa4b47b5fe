"""What training minimizes.

Shapes: `B` images, `K` captions an image, `T` words, `P` regions, `V` words known.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.captions.vocabulary import PAD


class Loss(NamedTuple):
    """The parts of the loss of a batch, summed: a step over several batches divides by the words of all."""

    cross_entropy: Tensor
    """Sum over words, in nats."""
    smoothed: Tensor
    """The same against smoothed targets."""
    words: Tensor
    """Number of words, `<end>` among them."""
    coverage: Tensor
    """Sum over captions of the mean over regions of (1 - attention summed over words) squared."""
    captions: Tensor
    """Number of captions."""

    @property
    def counts(self) -> Tensor:
        """Words and captions: [2]."""
        return torch.stack([self.words, self.captions])

    def total(self, counts: Tensor, doubly_stochastic_weight: float) -> Tensor:
        """What this batch adds to the loss of a step that has so many words and captions in all."""
        return self.smoothed / counts[0] + doubly_stochastic_weight * self.coverage / counts[1]


def caption_loss(logits: Tensor, attention: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Loss:
    """Cross-entropy and doubly stochastic regularization (Xu et al. 2015, section 4.2.1).

    Takes logits [B, K, T, V], attention [B, K, T, P] and target ids [B, K, T], where `<pad>` asks for nothing. Label
    smoothing gives that share of the target to all words of the vocabulary alike (Szegedy et al. 2016). The paper sums
    the second term over regions and public code scales it in several ways; here it is a mean, so that its weight
    means the same for every grid.
    """
    wanted = targets != PAD  # [B, K, T]
    flat = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 2)
    if label_smoothing:
        log_probability = flat.log_softmax(dim=-1)
        cross_entropy = F.nll_loss(log_probability, targets.flatten(), ignore_index=PAD, reduction="sum")
        even = -(log_probability.mean(dim=-1) * wanted.flatten()).sum()
        smoothed = (1 - label_smoothing) * cross_entropy + label_smoothing * even
    else:
        smoothed = cross_entropy = F.cross_entropy(flat, targets.flatten(), ignore_index=PAD, reduction="sum")
    received = (attention * wanted.unsqueeze(-1)).sum(dim=2)  # [B, K, P]
    present = wanted.any(dim=2)
    coverage = ((1 - received).square().mean(dim=-1) * present).sum()
    return Loss(cross_entropy, smoothed, wanted.sum(), coverage, present.sum())
