"""ROUGE-L: the longest run of words, gaps allowed, that a caption shares with a reference."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.metrics.corpus import LIBRARY, Words, check_corpus

BETA = 1.2
PROTOCOL: dict[str, str | float] = {
    "metric": "ROUGE-L",
    "library": LIBRARY,
    "beta": BETA,
    "average": "mean over images",
    "several references": "best precision and best recall, each over all references",
    "smoothing": "none",
    "reference": "Lin 2004",
}


def rouge_l(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> npt.NDArray[np.float64]:
    """ROUGE-L of each image, [N], in 0 to 1 (Lin 2004); a corpus scores their mean.

    With the longest common subsequence as a share of the hypothesis (P) and of the reference (R), the score
    is (1 + b^2) P R / (R + b^2 P), b = 1.2. As in coco-caption, P and R are each the best over all
    references.

    Raises `ValueError` as `check_corpus` does.
    """
    check_corpus(hypotheses, references)
    return np.array([_score(*pair) for pair in zip(hypotheses, references, strict=True)])


def _score(hypothesis: Words, references: Sequence[Words]) -> float:
    places: dict[str, int] = {}
    for position, word in enumerate(hypothesis):
        places[word] = places.get(word, 0) | 1 << position
    common = [_longest_common(places, len(hypothesis), reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(hypothesis)
    recall = max(shared / len(words) for shared, words in zip(common, references, strict=True) if words)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(places: dict[str, int], length: int, words: Words) -> int:
    """Length of the longest common subsequence, by the bit-parallel recurrence of Hyyrö (2004).

    `places` has a bit set for each position of a word in the other sentence, of `length` words. Bit i of
    `row` is 0 where the subsequence grows by one at position i, so the zeros are its length.
    """
    row = everything = (1 << length) - 1
    for word in words:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return length - row.bit_count()
