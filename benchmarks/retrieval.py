"""Captioning without a decoder: what was said of the nearest training photographs.

Photographs are compared by the cosine of their features, which are mean-pooled over regions and centerd by the training
mean. All captions of the nearest are candidates; the consensus caption is the one most like the others (Devlin et al.
2015, arXiv:1505.04467). The paper counts likeness to a number of others alone, the most alike; here all others count.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.metrics.cider import ORDERS
from pipeline.metrics.corpus import Words

NEIGHBORS = 20
"""Training photographs whose captions are candidates."""

Ngram = tuple[str, ...]
Pooled = npt.NDArray[np.float32]


def retrieve(pooled: Pooled, train: Pooled, captions: Sequence[Sequence[Words]]) -> list[Words]:
    """The consensus caption of each photograph: pooled features [N, C] and [M, C], and the captions of the M."""
    frequencies = document_frequencies(captions)
    found = []
    for near in nearest(pooled, train, NEIGHBORS).tolist():
        candidates = [words for neighbor in near for words in captions[neighbor]]
        found.append(candidates[consensus(candidates, frequencies, len(captions))])
    return found


def nearest(pooled: Pooled, train: Pooled, count: int) -> npt.NDArray[np.intp]:
    """Places in `train` [M, C] of what is nearest to each row of `pooled` [N, C], the nearest first: [N, count]."""
    mean = train.mean(axis=0)

    def directions(features: Pooled) -> Pooled:
        centerd: Pooled = features - mean
        scaled: Pooled = centerd / np.maximum(np.linalg.norm(centerd, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return scaled

    return np.argsort(-directions(pooled) @ directions(train).T, axis=1, kind="stable")[:, :count]


def document_frequencies(captions: Sequence[Sequence[Words]]) -> Counter[Ngram]:
    """In the captions of how many images each n-gram stands."""
    return Counter(
        ngram
        for own in captions
        for ngram in {ngram for words in own for order in range(1, ORDERS + 1) for ngram in _ngrams(words, order)}
    )


def consensus(candidates: Sequence[Words], frequencies: Mapping[Ngram, int], images: int) -> int:
    """Place of the candidate whose mean CIDEr (Vedantam et al. 2015) against each of the others is highest.

    That is the cosine of n-gram counts times log(images / frequency), averaged over n from 1 to 4. The first of equals.
    """
    similarity = np.zeros((len(candidates), len(candidates)))
    for order in range(1, ORDERS + 1):
        counts = [Counter(_ngrams(words, order)) for words in candidates]
        columns = {ngram: column for column, ngram in enumerate({ngram: None for own in counts for ngram in own})}
        vectors = np.zeros((len(candidates), len(columns)))
        for row, own in enumerate(counts):
            for ngram, count in own.items():
                vectors[row, columns[ngram]] = count * np.log(images / frequencies[ngram])
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.where(norms > 0, norms, 1.0)
        similarity += vectors @ vectors.T
    np.fill_diagonal(similarity, 0.0)
    return int(similarity.sum(axis=1).argmax())


def _ngrams(words: Words, order: int) -> list[Ngram]:
    return [tuple(words[start : start + order]) for start in range(len(words) - order + 1)]
