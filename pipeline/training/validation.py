"""Validation after each epoch: teacher forcing, and BLEU-4 and CIDEr-D of greedy captions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.captions.vocabulary import Vocabulary
from pipeline.decoder.decoder import Decoder
from pipeline.generation.ensemble import caption_grids
from pipeline.generation.search import SearchParams
from pipeline.metrics.bleu import bleu, bleu_counts
from pipeline.metrics.cider import cider, is_defined
from pipeline.metrics.corpus import Words
from pipeline.training.batches import Batch, CaptionBatches
from pipeline.training.teacher_forcing import BatchPredictions, TeacherForcedResult, evaluate_batch, merge_results

SelectBy = Literal["bleu4", "cider", "last"]


class NonFiniteLossError(Exception):
    """The validation loss is NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Metrics of the validation split, and the captions that they were computed from."""

    loss: float
    """Mean cross-entropy under teacher forcing, in nats per word."""
    accuracy: float
    """Fraction of words predicted correctly under teacher forcing."""
    bleu4: float
    """BLEU-4 of greedy captions, 0 to 1."""
    cider: float | None
    """CIDEr-D of greedy captions, 0 to 10; None if the references do not define it, as those of one image."""
    captions: Mapping[int, Words]
    """Greedy caption of each image, by image id."""

    @property
    def metrics(self) -> dict[str, float | None]:
        """The metrics under their names in `history.json` and the live metrics."""
        return {
            "val_loss": self.loss,
            "val_accuracy": self.accuracy,
            "val_bleu4": self.bleu4,
            "val_cider": self.cider,
        }

    def selection_score(self, select_by: SelectBy, epoch: int) -> float:
        """Return the score by which the best epoch is selected; `last` selects the highest epoch."""
        match select_by:
            case "bleu4":
                return self.bleu4
            case "cider":
                assert self.cider is not None, "checked before the first epoch"
                return self.cider
            case "last":
                return epoch


def validate(
    decoder: Decoder,
    batches: CaptionBatches,
    references: Mapping[int, Sequence[Words]],
    vocabulary: Vocabulary,
    max_length: int,
) -> ValidationResult:
    """Evaluate a decoder on the validation split.

    Args:
        decoder: The decoder, in evaluation mode.
        batches: Images and captions of the split, on the decoder's device.
        references: Captions of each image as words, by image id.
        vocabulary: Vocabulary of the decoder.
        max_length: Maximum length of a greedy caption, in words.

    Raises:
        NonFiniteLossError: The loss of a batch is NaN or infinite.
    """
    results: list[TeacherForcedResult] = []
    captions: dict[int, Words] = {}
    for batch in batches.by_length():
        predictions = evaluate_batch(decoder, batch)
        try:
            captions |= _greedy_captions(decoder, batch, vocabulary, max_length)
        finally:  # After the search, which waits for a GPU. A loss that is not finite explains an error of the search.
            results.append(_read_finite(predictions))
    teacher_forced = merge_results(results)
    hypotheses, image_references = [captions[image_id] for image_id in references], list(references.values())
    counts = bleu_counts(hypotheses, image_references)
    return ValidationResult(
        loss=teacher_forced.loss,
        accuracy=teacher_forced.accuracy,
        bleu4=float(bleu(counts.sum(axis=0))[3]),
        cider=float(cider(hypotheses, image_references).cider_d.mean()) if is_defined(image_references) else None,
        captions=captions,
    )


def _read_finite(predictions: BatchPredictions) -> TeacherForcedResult:
    result = predictions.read()
    if not math.isfinite(result.loss):
        raise NonFiniteLossError(f"the validation loss is {result.loss}")
    return result


def _greedy_captions(decoder: Decoder, batch: Batch, vocabulary: Vocabulary, max_length: int) -> dict[int, Words]:
    search = SearchParams.greedy(max_length)
    results = caption_grids([decoder], vocabulary.words, batch.grids, batch.image_ids, search)
    return {image_id: best.words for image_id, (best, *_) in zip(batch.image_ids, results, strict=True)}
