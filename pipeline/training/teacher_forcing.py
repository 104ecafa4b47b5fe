"""The decoder under teacher forcing: how well it predicts each next word of captions that people wrote."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.captions.vocabulary import PAD
from pipeline.decoder.soft_attention import SoftAttentionDecoder
from pipeline.training.batches import Batch, CaptionBatches
from pipeline.training.loss import caption_loss


@dataclass(frozen=True, kw_only=True)
class TeacherForcedResult:
    """Predictions of every word of a split."""

    loss: float
    """Mean cross-entropy, in nats a word."""
    predicted: NDArray[np.int64]
    """[words] ids of the likeliest words."""
    target: NDArray[np.int64]
    """[words] ids of the words that stood there; `<end>` counts as a word."""


def evaluate_split(decoder: SoftAttentionDecoder, batches: CaptionBatches, device: torch.device) -> TeacherForcedResult:
    """Show a decoder, in evaluation mode, the captions of a split, and collect what it predicts."""
    return merge_results([evaluate_batch(decoder, batch, device) for batch in batches.in_order()])


@torch.inference_mode()
def evaluate_batch(decoder: SoftAttentionDecoder, batch: Batch, device: torch.device) -> TeacherForcedResult:
    """Show a decoder, in evaluation mode, the captions of one batch."""
    assert not decoder.training, "dropout would make the loss random"
    tokens = batch.tokens.to(device)
    logits, attention = decoder(batch.grids.to(device), tokens[:, :, :-1])
    targets = tokens[:, :, 1:]
    asked = targets != PAD
    loss = caption_loss(logits, attention, targets)
    return TeacherForcedResult(
        loss=(loss.cross_entropy / loss.words).item(),
        predicted=logits.argmax(dim=-1)[asked].cpu().numpy(),
        target=targets[asked].cpu().numpy(),
    )


def merge_results(parts: Sequence[TeacherForcedResult]) -> TeacherForcedResult:
    """Put the batches of a split together."""
    words = [len(part.target) for part in parts]
    return TeacherForcedResult(
        loss=float(np.average([part.loss for part in parts], weights=words)),
        predicted=np.concatenate([part.predicted for part in parts]),
        target=np.concatenate([part.target for part in parts]),
    )
