"""Evaluation under teacher forcing: loss and most likely word at every position of the reference captions.

Shapes: `B` images, `K` captions per image, `T` words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.captions.vocabulary import PAD
from pipeline.decoder.decoder import Decoder
from pipeline.training.batches import Batch, CaptionBatches
from pipeline.training.loss import predict_words


@dataclass(frozen=True, kw_only=True)
class TeacherForcedResult:
    """Predictions for all N words of some captions; `<end>` counts as a word."""

    loss: float
    """Mean cross-entropy, in nats per word."""
    predicted: NDArray[np.int64]
    """Ids of the most likely words [N]."""
    target: NDArray[np.int64]
    """Ids of the reference words [N]."""

    @property
    def accuracy(self) -> float:
        """Fraction of words that are predicted correctly."""
        return float((self.predicted == self.target).mean())


def evaluate_split(decoder: Decoder, batches: CaptionBatches, device: torch.device) -> TeacherForcedResult:
    """Evaluate a decoder, in evaluation mode, on all captions of a split."""
    with torch.inference_mode():
        word_projection = decoder.project_vocabulary()
    return merge_results([evaluate_batch(decoder, batch, device, word_projection) for batch in batches.by_length()])


@torch.inference_mode()
def evaluate_batch(
    decoder: Decoder, batch: Batch, device: torch.device, word_projection: Tensor | None = None
) -> TeacherForcedResult:
    """Evaluate a decoder, in evaluation mode, on the captions of one batch.

    Args:
        decoder: The decoder, on `device`.
        batch: Images and captions.
        device: Where to compute.
        word_projection: Result of `project_vocabulary`, for many batches; None projects the words of this batch.
    """
    assert not decoder.training, "dropout would make the loss random"
    tokens = batch.tokens.to(device)  # [B, K, T + 1]
    outputs, _ = decoder(batch.grids.to(device), tokens[:, :, :-1], word_projection, with_logits=False)
    targets = tokens[:, :, 1:]  # [B, K, T]
    mask = targets != PAD  # [B, K, T]
    cross_entropy, predicted = predict_words(outputs, decoder.output_proj, targets)
    return TeacherForcedResult(
        loss=(cross_entropy / mask.sum()).item(),
        predicted=predicted[mask].cpu().numpy(),
        target=targets[mask].cpu().numpy(),
    )


def merge_results(results: Sequence[TeacherForcedResult]) -> TeacherForcedResult:
    """Merge the results of batches. The loss of a batch is weighted by its number of words."""
    num_words = [len(result.target) for result in results]
    return TeacherForcedResult(
        loss=float(np.average([result.loss for result in results], weights=num_words)),
        predicted=np.concatenate([result.predicted for result in results]),
        target=np.concatenate([result.target for result in results]),
    )
