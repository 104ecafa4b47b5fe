"""CIDEr and CIDEr-D: how much a caption shares with its references of what sets their image apart.

Legend: `N` images, `R` references in all, `S` sentences: the N hypotheses, then the R references.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from pipeline.metrics.corpus import LIBRARY, Words, check_corpus

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ORDERS = 4
SIGMA = 6.0
SCALE = 10.0
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


@dataclass(frozen=True, kw_only=True, slots=True)
class CiderScores:
    """Scores of each image; a corpus scores their mean."""

    cider_d: Floats
    """CIDEr-D, [N], 0 to 10: repeated words and unlike lengths count against a caption. Papers report it."""
    cider: Floats
    """CIDEr, [N], 0 to 10: the plain cosine."""


def cider(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> CiderScores:
    """Score N captions by CIDEr-D and CIDEr (Vedantam et al. 2015), both times 10.

    Sentences are vectors of n-gram counts times log(N / number of images with the n-gram in a reference), for
    n from 1 to 4; the score is the cosine of hypothesis and reference, averaged over n and references.
    CIDEr-D clips the hypothesis to the reference and multiplies by exp(-(difference of lengths in words)^2 /
    (2 * 6^2)). A single image scores 0: nothing sets it apart from others. Words are compared as they are;
    the paper stems them.

    Raises `ValueError` as `check_corpus` does.
    """
    check_corpus(hypotheses, references)
    images = len(hypotheses)
    per_image = np.array([len(captions) for captions in references])
    image = np.concatenate([np.arange(images), np.repeat(np.arange(images), per_image)])  # [S]
    sentences = [*hypotheses, *chain.from_iterable(references)]
    length = np.array([len(words) for words in sentences])

    plain, clipped = np.zeros(len(sentences) - images), np.zeros(len(sentences) - images)  # [R]
    for sentence, ngram in _ngrams(sentences, length):
        cosine, clipped_cosine = _cosines(sentence, ngram, image, images)
        plain += cosine
        clipped += clipped_cosine
    difference = length[images:] - length[image[images:]]
    clipped *= np.exp(-(difference**2) / (2 * SIGMA**2))

    share = SCALE / (ORDERS * per_image)
    return CiderScores(
        cider_d=share * np.bincount(image[images:], clipped), cider=share * np.bincount(image[images:], plain)
    )


def _ngrams(sentences: Sequence[Words], length: Ints) -> Iterator[tuple[Ints, Ints]]:
    """For each order, of every n-gram in the corpus: its sentence, and a number for its words."""
    numbers: dict[str, int] = {}
    word = np.array([numbers.setdefault(word, len(numbers)) for words in sentences for word in words], dtype=np.int64)
    sentence = np.repeat(np.arange(len(sentences)), length)
    end = np.cumsum(length)[sentence]
    start, ngram = np.arange(len(word)), word
    yield sentence, ngram
    for order in range(2, ORDERS + 1):
        fits = start + order <= end[start]
        start = start[fits]
        longer = ngram[fits] * len(numbers) + word[start + order - 1]
        # Numbered afresh, so that the numbers stay small enough to multiply at any order.
        ngram = np.unique(longer, return_inverse=True)[1]
        yield sentence[start], ngram


def _cosines(sentence: Ints, ngram: Ints, image: Ints, images: int) -> tuple[Floats, Floats]:
    """Cosine of each reference [R] with the hypothesis for its image: plain, and clipped."""
    kinds = int(ngram.max(initial=0)) + 1
    key, count = np.unique(sentence * kinds + ngram, return_counts=True)
    sentence, ngram = np.divmod(key, kinds)
    first = int(np.searchsorted(sentence, images))  # where the references begin
    # A hypothesis has the number of its image, so its keys can be looked up by image and n-gram.
    wanted = image[sentence[first:]] * kinds + ngram[first:]
    documents = np.bincount(np.unique(wanted) % kinds, minlength=kinds)
    weight = count * (np.log(images) - np.log(np.maximum(documents, 1)))[ngram]
    norm = np.sqrt(np.bincount(sentence, weight**2, minlength=len(image)))

    place = np.searchsorted(key[:first], wanted)
    shared = np.flatnonzero(np.append(key[:first], -1)[place] == wanted)
    own, other = weight[place[shared]], weight[first + shared]
    reference = sentence[first + shared] - images
    norms = norm[images:] * norm[image[images:]]
    norms[norms == 0] = 1.0

    def cosine(products: Floats) -> Floats:
        sums: Floats = np.bincount(reference, products, minlength=len(norms)) / norms
        return sums

    return cosine(own * other), cosine(np.minimum(own, other) * other)
