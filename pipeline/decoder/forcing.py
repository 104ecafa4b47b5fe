"""The decoder under teacher forcing: how well it predicts each next word of captions that people wrote."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.captions.vocabulary import PAD
from pipeline.decoder.attention import AttentionDecoder
from pipeline.decoder.batches import Batch, CaptionBatches
from pipeline.decoder.objective import objective


@dataclass(frozen=True, kw_only=True)
class Forced:
    """Predictions of every word of a split."""

    loss: float
    """Mean cross-entropy, in nats a word."""
    predicted: NDArray[np.int64]
    """[words] ids of the likeliest words."""
    target: NDArray[np.int64]
    """[words] ids of the words that stood there; `<end>` counts as a word."""


def teacher_forced(decoder: AttentionDecoder, batches: CaptionBatches, device: torch.device) -> Forced:
    """Show a decoder, in evaluation mode, the captions of a split, and collect what it predicts."""
    return merged([force(decoder, batch, device) for batch in batches.in_order()])


@torch.inference_mode()
def force(decoder: AttentionDecoder, batch: Batch, device: torch.device) -> Forced:
    """Show a decoder, in evaluation mode, the captions of one batch."""
    assert not decoder.training, "dropout would make the loss random"
    tokens = batch.tokens.to(device)
    logits, attention = decoder(batch.grids.to(device), tokens[:, :, :-1])
    targets = tokens[:, :, 1:]
    asked = targets != PAD
    loss = objective(logits, attention, targets)
    return Forced(
        loss=(loss.cross_entropy / loss.words).item(),
        predicted=logits.argmax(dim=-1)[asked].cpu().numpy(),
        target=targets[asked].cpu().numpy(),
    )


def merged(parts: Sequence[Forced]) -> Forced:
    """Put the batches of a split together."""
    words = [len(part.target) for part in parts]
    return Forced(
        loss=float(np.average([part.loss for part in parts], weights=words)),
        predicted=np.concatenate([part.predicted for part in parts]),
        target=np.concatenate([part.target for part in parts]),
    )
