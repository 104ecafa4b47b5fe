"""Captioning by retrieval, without a decoder: a caption of the nearest training images is returned unchanged.

Images are compared by the cosine similarity of their features, which are averaged over regions and centered by the
training mean. All captions of the nearest images are candidates. The consensus caption is the candidate with the
highest mean CIDEr against all other candidates (Devlin et al. 2015, arXiv:1505.04467; the paper averages over the most
similar candidates only).

Shapes: `N` images to caption, `M` training images, `C` channels.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.metrics.cider import MAX_ORDER
from pipeline.metrics.corpus import Words

NUM_NEIGHBORS = 20
"""Training images whose captions are candidates."""

Ngram = tuple[str, ...]
Pooled = npt.NDArray[np.float32]


def retrieve(pooled: Pooled, train_pooled: Pooled, train_captions: Sequence[Sequence[Words]]) -> list[Words]:
    """Return the consensus caption of each image.

    Args:
        pooled: Features of the images to caption, averaged over regions [N, C].
        train_pooled: Features of the training images, averaged over regions [M, C].
        train_captions: Captions of the training images.
    """
    frequencies = document_frequencies(train_captions)
    results = []
    for neighbors in nearest(pooled, train_pooled, NUM_NEIGHBORS).tolist():
        candidates = [words for neighbor in neighbors for words in train_captions[neighbor]]
        results.append(candidates[consensus(candidates, frequencies, len(train_captions))])
    return results


def nearest(pooled: Pooled, train_pooled: Pooled, num_neighbors: int) -> npt.NDArray[np.intp]:
    """Find the nearest training images of each image.

    Args:
        pooled: Features of the images [N, C].
        train_pooled: Features of the training images [M, C].
        num_neighbors: Training images to return for each image.

    Returns:
        Indices of training images, nearest first [N, num_neighbors].
    """
    mean = train_pooled.mean(axis=0)

    def normalize(features: Pooled) -> Pooled:
        centered: Pooled = features - mean
        norms = np.linalg.norm(centered, axis=1, keepdims=True)
        normalized: Pooled = centered / np.maximum(norms, np.finfo(np.float32).tiny)
        return normalized

    similarity = normalize(pooled) @ normalize(train_pooled).T  # [N, M]
    return np.argsort(-similarity, axis=1, kind="stable")[:, :num_neighbors]


def document_frequencies(captions: Sequence[Sequence[Words]]) -> Counter[Ngram]:
    """Count the images with each n-gram in at least one of their captions."""
    return Counter(
        ngram
        for image_captions in captions
        for ngram in {
            ngram for words in image_captions for order in range(1, MAX_ORDER + 1) for ngram in _ngrams(words, order)
        }
    )


def consensus(candidates: Sequence[Words], frequencies: Mapping[Ngram, int], num_images: int) -> int:
    """Return the index of the candidate with the highest mean CIDEr against the other candidates.

    CIDEr (Vedantam et al. 2015) is the cosine similarity of n-gram counts weighted by log(images / frequency), averaged
    over n from 1 to 4. Ties are resolved in favor of the first candidate.

    Args:
        candidates: Captions as words.
        frequencies: Document frequencies of their n-grams.
        num_images: Number of images in which the frequencies were counted.
    """
    similarity = np.zeros((len(candidates), len(candidates)))
    for order in range(1, MAX_ORDER + 1):
        counts = [Counter(_ngrams(words, order)) for words in candidates]
        columns = {
            ngram: column for column, ngram in enumerate(dict.fromkeys(ngram for row in counts for ngram in row))
        }
        vectors = np.zeros((len(candidates), len(columns)))
        for row, candidate_counts in enumerate(counts):
            for ngram, count in candidate_counts.items():
                vectors[row, columns[ngram]] = count * np.log(num_images / frequencies[ngram])
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.where(norms > 0, norms, 1.0)
        similarity += vectors @ vectors.T
    np.fill_diagonal(similarity, 0.0)
    return int(similarity.sum(axis=1).argmax())


def _ngrams(words: Words, order: int) -> list[Ngram]:
    return [tuple(words[start : start + order]) for start in range(len(words) - order + 1)]
