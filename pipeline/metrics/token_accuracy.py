"""How well a decoder guesses the next token when it is shown the true ones before it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.metrics.corpus import LIBRARY

PROTOCOL: dict[str, str] = {
    "metric": "token accuracy, macro F1 and weighted F1",
    "library": LIBRARY,
    "decoding": "teacher forcing, the likeliest token",
    "classes": "tokens that occur among the targets",
    "smoothing": "none",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """Scores of next-token guesses, in 0 to 1."""

    accuracy: float
    """Share of guesses that are right."""
    macro_f1: float
    """Mean F1 over the classes that occur among the targets: a rare token weighs as much as a common one."""
    weighted_f1: float
    """Mean F1 over the same classes, each weighted by its number of targets."""


def token_scores(predicted: npt.NDArray[np.integer], target: npt.NDArray[np.integer]) -> TokenScores:
    """Score predicted token ids [tokens] against target ids [tokens], both without padding.

    F1 of class c is 2 * right(c) / (predicted(c) + targets(c)). A class that is only ever predicted lowers
    the F1 of the classes it stands in for, but has none of its own (scikit-learn's macro average counts it as
    0).

    Raises `ValueError` where the shapes differ, are not flat or are empty, or an id is negative.
    """
    if predicted.shape != target.shape or target.ndim != 1 or target.size == 0:
        raise ValueError(f"want two flat arrays of one length, got shapes {predicted.shape} and {target.shape}")
    if min(predicted.min(), target.min()) < 0:
        raise ValueError("token ids must be >= 0")
    classes = int(max(predicted.max(), target.max())) + 1
    right = np.bincount(target[predicted == target], minlength=classes)
    targets = np.bincount(target, minlength=classes)
    occurs = targets > 0
    f1 = 2 * right[occurs] / (np.bincount(predicted, minlength=classes) + targets)[occurs]
    return TokenScores(
        accuracy=float(right.sum() / target.size),
        macro_f1=float(f1.mean()),
        weighted_f1=float(f1 @ targets[occurs] / target.size),
    )
