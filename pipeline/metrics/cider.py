"""CIDEr and CIDEr-D: consensus of a caption with its references, by tf-idf weighted n-grams (Vedantam et al. 2015).

Legend: `N` images, `R` references of all images, `S` = N + R sentences: the hypotheses, then the references.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from pipeline.metrics.corpus import LIBRARY, LIBRARY_TAG, Words, check_corpus

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ORDERS = 4
"""Largest n of the n-grams."""
SIGMA = 6.0
"""Standard deviation of CIDEr-D's length penalty, in words."""
SCALE = 10.0
"""Factor of both scores."""
PROTOCOL: dict[str, str | int | float] = {
    "metric": "CIDEr-D and CIDEr",
    "library": LIBRARY,
    "n": ORDERS,
    "sigma": SIGMA,
    "scale": SCALE,
    "average": "mean over images",
    "document frequencies": "references of the scored images",
    "stemming": "none",
    "smoothing": "none",
    "reference": "Vedantam et al. 2015",
}
SIGNATURE: dict[str, str] = {"n": str(ORDERS), "df": "corpus", "stem": "no", "lib": LIBRARY_TAG}
SIGNATURE_D: dict[str, str] = {
    "n": str(ORDERS),
    "sigma": f"{SIGMA:g}",
    "df": "corpus",
    "stem": "no",
    "lib": LIBRARY_TAG,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CiderScores:
    """Scores of each image; the score of a corpus is their mean."""

    cider_d: Floats
    """CIDEr-D, [N] in 0 to 10. It penalizes repeated words and differences in length; papers report it."""
    cider: Floats
    """CIDEr, [N] in 0 to 10: the cosine similarity alone."""


def cider(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> CiderScores:
    """Compute CIDEr-D and CIDEr of each image, both scaled by 10.

    A sentence is a vector of n-gram counts times log(N / number of images with the n-gram in a reference), for n from
    1 to 4. The score is the cosine of hypothesis and reference, averaged over n and references. CIDEr-D clips the
    hypothesis to the reference and multiplies by exp(-(difference in length)^2 / (2 * 6^2)). A corpus of one image
    scores 0, since all document frequencies are 1. Words are not stemmed, unlike in the paper.

    Args:
        hypotheses: One tokenized caption for each of N images.
        references: The tokenized references of each image.

    Raises:
        ValueError: There are no images, or one has no reference.
    """
    check_corpus(hypotheses, references)
    num_images = len(hypotheses)
    num_references = np.array([len(captions) for captions in references])  # [N]
    image = np.concatenate([np.arange(num_images), np.repeat(np.arange(num_images), num_references)])  # [S]
    sentences = [*hypotheses, *chain.from_iterable(references)]
    length = np.array([len(words) for words in sentences])  # [S]

    cider_sum, cider_d_sum = np.zeros(len(sentences) - num_images), np.zeros(len(sentences) - num_images)  # [R]
    for sentence, ngram in _ngrams(sentences, length):
        cosine, clipped_cosine = _cosines(sentence, ngram, image, num_images)
        cider_sum += cosine
        cider_d_sum += clipped_cosine
    difference = length[num_images:] - length[image[num_images:]]
    cider_d_sum *= np.exp(-(difference**2) / (2 * SIGMA**2))

    factor = SCALE / (ORDERS * num_references)
    return CiderScores(
        cider_d=factor * np.bincount(image[num_images:], cider_d_sum),
        cider=factor * np.bincount(image[num_images:], cider_sum),
    )


def _ngrams(sentences: Sequence[Words], length: Ints) -> Iterator[tuple[Ints, Ints]]:
    """For each order, yield of every n-gram occurrence its sentence and an id of its words."""
    word_ids: dict[str, int] = {}
    word = np.array([word_ids.setdefault(word, len(word_ids)) for words in sentences for word in words], dtype=np.int64)
    sentence = np.repeat(np.arange(len(sentences)), length)
    end = np.cumsum(length)[sentence]
    start, ngram = np.arange(len(word)), word
    yield sentence, ngram
    for order in range(2, ORDERS + 1):
        fits = start + order <= end[start]
        start = start[fits]
        longer = ngram[fits] * len(word_ids) + word[start + order - 1]
        # New consecutive ids, so that the product stays within int64 at any order.
        ngram = np.unique(longer, return_inverse=True)[1]
        yield sentence[start], ngram


def _cosines(sentence: Ints, ngram: Ints, image: Ints, num_images: int) -> tuple[Floats, Floats]:
    """Compute the cosine of each reference with the hypothesis of its image.

    Args:
        sentence: Sentence of each n-gram occurrence.
        ngram: Id of each n-gram occurrence.
        image: Image of each sentence, [S].
        num_images: N.

    Returns:
        The cosines of CIDEr and the clipped ones of CIDEr-D, each [R].
    """
    num_ngrams = int(ngram.max(initial=0)) + 1
    key, count = np.unique(sentence * num_ngrams + ngram, return_counts=True)
    sentence, ngram = np.divmod(key, num_ngrams)
    num_keys = int(np.searchsorted(sentence, num_images))  # keys of hypotheses, which come first
    # A hypothesis has the index of its image, so image and n-gram of a reference give the key of its hypothesis.
    hypothesis_key = image[sentence[num_keys:]] * num_ngrams + ngram[num_keys:]
    document_frequency = np.bincount(np.unique(hypothesis_key) % num_ngrams, minlength=num_ngrams)
    weight = count * (np.log(num_images) - np.log(np.maximum(document_frequency, 1)))[ngram]
    norm = np.sqrt(np.bincount(sentence, weight**2, minlength=len(image)))  # [S]

    index = np.searchsorted(key[:num_keys], hypothesis_key)
    shared = np.flatnonzero(np.append(key[:num_keys], -1)[index] == hypothesis_key)
    hypothesis_weight, reference_weight = weight[index[shared]], weight[num_keys + shared]
    reference = sentence[num_keys + shared] - num_images
    norms = norm[num_images:] * norm[image[num_images:]]  # [R]
    norms[norms == 0] = 1.0

    def cosine(products: Floats) -> Floats:
        cosines: Floats = np.bincount(reference, products, minlength=len(norms)) / norms
        return cosines

    return (
        cosine(hypothesis_weight * reference_weight),
        cosine(np.minimum(hypothesis_weight, reference_weight) * reference_weight),
    )
