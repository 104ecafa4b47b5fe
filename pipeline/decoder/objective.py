"""What training minimises.

Shapes: `B` images, `K` captions an image, `T` words, `P` regions, `V` words known.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from pipeline.captions.vocabulary import PAD


class Loss(NamedTuple):
    """The parts of the loss, each a scalar tensor."""

    total: Tensor
    cross_entropy: Tensor
    """Mean over the words of the batch, in nats."""
    coverage: Tensor
    """Mean over captions and regions of (1 - attention summed over words) squared."""


def objective(logits: Tensor, attention: Tensor, targets: Tensor, coverage_weight: float) -> Loss:
    """Cross-entropy plus doubly stochastic regularisation (Xu et al. 2015, section 4.2.1).

    Takes logits [B, K, T, V], attention [B, K, T, P] and target ids [B, K, T], where `<pad>` asks for nothing. The
    paper sums the second term over regions and public code scales it in several ways; here it is a mean, so that its
    weight means the same for every grid.
    """
    wanted = targets != PAD  # [B, K, T]
    cross_entropy = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=PAD)
    received = (attention * wanted.unsqueeze(-1)).sum(dim=2)  # [B, K, P]
    present = wanted.any(dim=2)
    coverage = ((1 - received).square().mean(dim=-1) * present).sum() / present.sum()
    return Loss(cross_entropy + coverage_weight * coverage, cross_entropy, coverage)
