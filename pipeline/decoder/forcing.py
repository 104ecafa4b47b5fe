"""The decoder under teacher forcing: how well it predicts each next word of captions that people wrote."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.captions.vocabulary import PAD
from pipeline.decoder.attention import AttentionDecoder
from pipeline.decoder.batches import CaptionBatches
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


@torch.inference_mode()
def teacher_forced(decoder: AttentionDecoder, batches: CaptionBatches, device: torch.device) -> Forced:
    """Show a decoder, in evaluation mode, the captions of a split, and collect what it predicts."""
    assert not decoder.training, "dropout would make the loss random"
    loss, predicted, target = 0.0, [], []
    for batch in batches.in_order():
        tokens = batch.tokens.to(device)
        logits, attention = decoder(batch.grids.to(device), tokens[:, :, :-1])
        targets = tokens[:, :, 1:]
        asked = targets != PAD
        loss += objective(logits, attention, targets, 0.0).cross_entropy.item() * int(asked.sum())
        predicted.append(logits.argmax(dim=-1)[asked].cpu().numpy())
        target.append(targets[asked].cpu().numpy())
    words = sum(map(len, target))
    return Forced(loss=loss / words, predicted=np.concatenate(predicted), target=np.concatenate(target))
