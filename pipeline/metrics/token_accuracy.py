"""Accuracy and F1 of next-token predictions under teacher forcing."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.metrics.corpus import LIBRARY

PROTOCOL: dict[str, str] = {
    "metric": "token accuracy, macro F1 and weighted F1",
    "library": LIBRARY,
    "decoding": "teacher forcing, argmax token",
    "classes": "tokens that occur among the targets",
    "smoothing": "none",
}
"""Protocol lines of the scores, by key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """Scores of next-token predictions, in 0 to 1."""

    accuracy: float
    """Fraction of correct predictions."""
    macro_f1: float
    """Unweighted mean F1 of the classes that occur among the targets."""
    weighted_f1: float
    """Mean F1 of the same classes, weighted by their number of targets."""


def token_scores(predicted: npt.NDArray[np.integer], target: npt.NDArray[np.integer]) -> TokenScores:
    """Score predicted token ids against target ids.

    F1 of class c is 2 * correct(c) / (predicted(c) + targets(c)). A class that is only predicted lowers the F1 of the
    true classes, but is not averaged itself. (scikit-learn's macro average includes it as 0.)

    Args:
        predicted: Predicted ids, [tokens], without padding.
        target: Target ids, [tokens], without padding.

    Raises:
        ValueError: The arrays differ in shape, are not one-dimensional or are empty, or an id is negative.
    """
    if predicted.shape != target.shape or target.ndim != 1 or target.size == 0:
        raise ValueError(f"expected two 1-D arrays of one length, got shapes {predicted.shape} and {target.shape}")
    if min(predicted.min(), target.min()) < 0:
        raise ValueError("token ids must be >= 0")
    num_classes = int(max(predicted.max(), target.max())) + 1
    correct = np.bincount(target[predicted == target], minlength=num_classes)
    targets = np.bincount(target, minlength=num_classes)
    occurs = targets > 0
    f1 = 2 * correct[occurs] / (np.bincount(predicted, minlength=num_classes) + targets)[occurs]
    return TokenScores(
        accuracy=float(correct.sum() / target.size),
        macro_f1=float(f1.mean()),
        weighted_f1=float(f1 @ targets[occurs] / target.size),
    )
