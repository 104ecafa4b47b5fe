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


@dataclass(frozen=True, kw_only=True)
class BatchPredictions:
    """Predictions for the captions of one batch, still on the device."""

    loss: Tensor
    """Mean cross-entropy, in nats per word."""
    predicted: Tensor
    """Ids of the most likely words [B, K, T]."""
    targets: Tensor
    """Ids of the reference words [B, K, T], padded with `<pad>`."""

    def read(self) -> TeacherForcedResult:
        """Return the result, once the device has computed it."""
        predicted, targets = self.predicted.cpu(), self.targets.cpu()
        mask = targets != PAD  # [B, K, T]
        return TeacherForcedResult(
            loss=self.loss.item(), predicted=predicted[mask].numpy(), target=targets[mask].numpy()
        )


def evaluate_split(decoder: Decoder, batches: CaptionBatches) -> TeacherForcedResult:
    """Evaluate a decoder, in evaluation mode, on all captions of a split, on the device of both."""
    with torch.inference_mode():
        word_projection = decoder.project_vocabulary()
    predictions = [evaluate_batch(decoder, batch, word_projection) for batch in batches.by_length()]
    return merge_results([batch.read() for batch in predictions])


@torch.inference_mode()
def evaluate_batch(decoder: Decoder, batch: Batch, word_projection: Tensor | None = None) -> BatchPredictions:
    """Evaluate a decoder, in evaluation mode, on the captions of one batch.

    Args:
        decoder: The decoder.
        batch: Images and captions, on the decoder's device.
        word_projection: Result of `project_vocabulary`, for many batches; None projects the words of this batch.
    """
    assert not decoder.training, "dropout would make the loss random"
    outputs, _ = decoder(batch.grids, batch.tokens[:, :, :-1], word_projection, with_logits=False)
    targets = batch.tokens[:, :, 1:]  # [B, K, T]
    cross_entropy, predicted = predict_words(outputs, decoder.output_proj, targets)
    return BatchPredictions(loss=cross_entropy / (targets != PAD).sum(), predicted=predicted, targets=targets)


def merge_results(results: Sequence[TeacherForcedResult]) -> TeacherForcedResult:
    """Merge the results of batches. The loss of a batch is weighted by its number of words."""
    num_words = [len(result.target) for result in results]
    return TeacherForcedResult(
        loss=float(np.average([result.loss for result in results], weights=num_words)),
        predicted=np.concatenate([result.predicted for result in results]),
        target=np.concatenate([result.target for result in results]),
    )
