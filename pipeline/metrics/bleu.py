"""BLEU-1 to BLEU-4 of a corpus of captions (Papineni et al. 2002).

BLEU divides counts that are summed over the corpus: sum the rows of `bleu_counts` over all images, a subset or a
bootstrap sample, and pass the sums to `bleu`.

Legend: `N` images.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.metrics.corpus import LIBRARY, LIBRARY_TAG, Words, check_corpus, ngrams

MAX_ORDER = 4
"""Largest n of the n-grams."""
# The constants of coco-caption's scorer, which avoid a division by 0 and a logarithm of 0.
_TINY, _SMALL = 1e-15, 1e-9
PROTOCOL: dict[str, str | int] = {
    "metric": "BLEU-1 to BLEU-4",
    "library": LIBRARY,
    "n": MAX_ORDER,
    "average": "corpus",
    "brevity": "closest reference, the shorter one of a tie",
    "smoothing": "none; 1e-15 is added to matches and 1e-9 to n-gram counts, as in coco-caption",
    "reference": "Papineni et al. 2002",
}
"""Protocol lines of BLEU, by key."""
SIGNATURE: dict[str, str] = {"smooth": "none", "brevity": "closest", "lib": LIBRARY_TAG}
"""Fields of BLEU's signature."""


def bleu_counts(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> npt.NDArray[np.int64]:
    """Count n-grams and lengths for BLEU.

    Args:
        hypotheses: One tokenized caption for each of N images.
        references: The tokenized references of each image.

    Returns:
        Counts [N, 9]. Columns 0 to 3 are the matched n-grams of order 1 to 4, clipped to the largest count in any one
        reference. Columns 4 to 7 are all n-grams of the hypothesis. Column 8 is the length in words of the reference
        closest in length, the shorter one of a tie.

    Raises:
        ValueError: There are no images, or one has no reference.
    """
    check_corpus(hypotheses, references)
    return np.array([_image_counts(*pair) for pair in zip(hypotheses, references, strict=True)], dtype=np.int64)


def bleu(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Compute BLEU-1 to BLEU-4, [..., 4] in 0 to 1, from summed counts [..., 9].

    As in coco-caption, the precision of an order is 1e-6 if the corpus has no n-gram of this order, and nearly 0 if
    none of its n-grams matches.
    """
    matched, total, closest_length = counts[..., :MAX_ORDER], counts[..., MAX_ORDER:-1], counts[..., -1:]
    log_precision = np.log((matched + _TINY) / (total + _SMALL))  # [..., 4]
    log_mean = np.cumsum(log_precision, axis=-1) / np.arange(1, MAX_ORDER + 1)  # [..., 4]
    length = total[..., :1] + _TINY
    scores: npt.NDArray[np.float64] = np.exp(log_mean + np.minimum(0.0, 1 - (closest_length + _SMALL) / length))
    return scores


def _image_counts(hypothesis: Words, references: Sequence[Words]) -> list[int]:
    counts = Counter(ngrams(hypothesis, MAX_ORDER))
    max_counts: dict[tuple[str, ...], int] = {}
    for reference in references:
        for ngram, count in Counter(filter(counts.__contains__, ngrams(reference, MAX_ORDER))).items():
            max_counts[ngram] = max(max_counts.get(ngram, 0), count)
    matched = [0] * MAX_ORDER
    for ngram, max_count in max_counts.items():
        matched[len(ngram) - 1] += min(counts[ngram], max_count)
    length = len(hypothesis)
    lengths = [len(reference) for reference in references]
    closest_length = min(lengths, key=lambda reference_length: (abs(reference_length - length), reference_length))
    return [*matched, *(max(length - order, 0) for order in range(MAX_ORDER)), closest_length]
