"""BLEU of a corpus of captions.

BLEU adds up counts over the corpus before it divides: sum the rows of `bleu_counts`, over all images or over
a resample of them, and give the sum to `bleu`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.metrics.corpus import LIBRARY, Words, check_corpus

ORDERS = 4
_TINY, _SMALL = 1e-15, 1e-9
PROTOCOL: dict[str, str | int] = {
    "metric": "BLEU-1 to BLEU-4",
    "library": LIBRARY,
    "n": ORDERS,
    "average": "corpus",
    "brevity": "closest reference, the shorter of two equally close",
    "smoothing": "none but 1e-15 on matches and 1e-9 on n-grams, as coco-caption has it",
    "reference": "Papineni et al. 2002",
}


def bleu_counts(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> npt.NDArray[np.int64]:
    """Count what BLEU needs, for each of N images: [N, 9].

    Columns 0 to 3 are the n-grams of order 1 to 4 that match a reference, each as often at most as it stands
    in the one reference that has it most often; columns 4 to 7 all n-grams of the hypothesis; column 8 the
    length in words of the reference whose length is closest to the hypothesis, the shorter of two equally
    close.

    Raises `ValueError` as `check_corpus` does.
    """
    check_corpus(hypotheses, references)
    return np.array([_count(*pair) for pair in zip(hypotheses, references, strict=True)], dtype=np.int64)


def bleu(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """BLEU-1 to BLEU-4, [..., 4], in 0 to 1, from summed counts [..., 9] (Papineni et al. 2002).

    Like the scorer of coco-caption, whose tiny constants keep it off a division by 0: a corpus without any n-gram of
    an order counts a precision of 1e-6 there, one of which none matches next to 0.
    """
    matched, proposed, closest = counts[..., :ORDERS], counts[..., ORDERS:-1], counts[..., -1:]
    log_precision = np.log((matched + _TINY) / (proposed + _SMALL))
    log_mean = np.cumsum(log_precision, axis=-1) / np.arange(1, ORDERS + 1)
    length = proposed[..., :1] + _TINY
    scores: npt.NDArray[np.float64] = np.exp(log_mean + np.minimum(0.0, 1 - (closest + _SMALL) / length))
    return scores


def _count(hypothesis: Words, references: Sequence[Words]) -> list[int]:
    proposed = Counter(_ngrams(hypothesis))
    limits: dict[tuple[str, ...], int] = {}
    for reference in references:
        for ngram, count in Counter(ngram for ngram in _ngrams(reference) if ngram in proposed).items():
            limits[ngram] = max(limits.get(ngram, 0), count)
    matched = [0] * ORDERS
    for ngram, limit in limits.items():
        matched[len(ngram) - 1] += min(proposed[ngram], limit)
    length = len(hypothesis)
    closest = min((len(reference) for reference in references), key=lambda other: (abs(other - length), other))
    return [*matched, *(max(length - order, 0) for order in range(ORDERS)), closest]


def _ngrams(words: Words) -> Iterator[tuple[str, ...]]:
    for order in range(1, ORDERS + 1):
        yield from zip(*(words[start:] for start in range(order)), strict=False)
