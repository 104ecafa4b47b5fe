"""ROUGE-L: the longest common subsequence of a caption and its references (Lin 2004).

Legend: `N` images.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.metrics.corpus import LIBRARY, LIBRARY_TAG, Words, check_corpus

BETA = 1.2
"""Weight of recall relative to precision."""
PROTOCOL: dict[str, str | float] = {
    "metric": "ROUGE-L",
    "library": LIBRARY,
    "beta": BETA,
    "average": "mean over images",
    "multiple references": "best precision and best recall, each over all references",
    "smoothing": "none",
    "reference": "Lin 2004",
}
"""Protocol lines of ROUGE-L, by key."""
SIGNATURE: dict[str, str] = {"beta": str(BETA), "lib": LIBRARY_TAG}
"""Fields of ROUGE-L's signature."""


def rouge_l(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> npt.NDArray[np.float64]:
    """Compute ROUGE-L of each image, [N] in 0 to 1; the score of a corpus is their mean.

    Precision P and recall R are the length of the longest common subsequence divided by the length of the hypothesis
    and of the reference. The score is (1 + BETA^2) P R / (R + BETA^2 P). As in coco-caption, P and R are each the best
    over all references.

    Args:
        hypotheses: One tokenized caption for each of N images.
        references: The tokenized references of each image.

    Raises:
        ValueError: There are no images, or one has no reference.
    """
    check_corpus(hypotheses, references)
    return np.array([_score(*pair) for pair in zip(hypotheses, references, strict=True)])


def _score(hypothesis: Words, references: Sequence[Words]) -> float:
    positions: dict[str, int] = {}
    for index, word in enumerate(hypothesis):
        positions[word] = positions.get(word, 0) | 1 << index
    lengths = [_longest_common_subsequence(positions, len(hypothesis), reference) for reference in references]
    if not any(lengths):
        return 0.0
    precision = max(lengths) / len(hypothesis)
    recall = max(length / len(words) for length, words in zip(lengths, references, strict=True) if words)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common_subsequence(positions: dict[str, int], length: int, reference: Words) -> int:
    """Return the length of the longest common subsequence, by the bit-parallel recurrence of Hyyrö (2004).

    Args:
        positions: Bit mask of the positions of each word in the hypothesis.
        length: Length of the hypothesis, in words.
        reference: The reference.
    """
    # Bit i of `row` is 0 where the subsequence grows by one at position i, so the number of zeros is its length.
    row = mask = (1 << length) - 1
    for word in reference:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & mask
    return length - row.bit_count()
