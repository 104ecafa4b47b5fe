"""CIDEr and CIDEr-D: consensus of a caption with its references, by tf-idf weighted n-grams (Vedantam et al. 2015).

Legend: `N` images, `R` references of all images, `S` = N + R sentences (the hypotheses, then the references),
`G` occurrences of n-grams, `K` distinct pairs of sentence and n-gram.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.metrics.corpus import LIBRARY, LIBRARY_TAG, Words, check_corpus, ngrams

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MAX_ORDER = 4
"""Largest n of the n-grams."""
SIGMA = 6.0
"""Standard deviation of CIDEr-D's length penalty, in words."""
SCALE = 10.0
"""Factor of both scores."""
PROTOCOL: dict[str, str | int | float] = {
    "metric": "CIDEr-D and CIDEr",
    "library": LIBRARY,
    "n": MAX_ORDER,
    "sigma": SIGMA,
    "scale": SCALE,
    "average": "mean over images",
    "document frequencies": "references of the scored images",
    "stemming": "none",
    "smoothing": "none",
    "reference": "Vedantam et al. 2015",
}
"""Protocol lines of both scores, by key."""
SIGNATURE: dict[str, str] = {"n": str(MAX_ORDER), "df": "corpus", "stem": "no", "lib": LIBRARY_TAG}
"""Fields of CIDEr's signature."""
SIGNATURE_D: dict[str, str] = {"n": SIGNATURE["n"], "sigma": f"{SIGMA:g}", **SIGNATURE}
"""Fields of CIDEr-D's signature."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CiderScores:
    """Scores of each image; the score of a corpus is their mean."""

    cider_d: FloatArray
    """CIDEr-D, [N] in 0 to `SCALE`. It penalizes repeated words and differences in length. Papers report it."""
    cider: FloatArray
    """CIDEr, [N] in 0 to `SCALE`: the cosine similarity alone."""


class _Occurrences(NamedTuple):
    """All n-grams of one order in some sentences."""

    sentence_index: IntArray
    """Sentence of each occurrence, [G]."""
    id: IntArray
    """Id of the n-gram of each occurrence, [G]: an index into `keys`."""
    keys: IntArray
    """Distinct n-grams, ascending: id of the first n - 1 words * number of words + id of the last word."""


class DocumentFrequencies:
    """Number of images of a corpus whose references have an n-gram."""

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        """Count the n-grams of a corpus.

        Args:
            references: The tokenized references of each image.
        """
        self.num_images = len(references)
        """Number of images of the corpus."""
        self._word_ids: dict[str, int] = {}
        sentences = list(chain.from_iterable(references))
        sentence_image = np.repeat(np.arange(self.num_images), [len(captions) for captions in references])
        self._tables: list[tuple[IntArray, IntArray]] = []
        """For each order, the keys of the n-grams and the number of images of each."""
        for occurrences in _ngrams(sentences, self._word_ids):
            pairs = np.unique(occurrences.id * self.num_images + sentence_image[occurrences.sentence_index])
            self._tables.append((occurrences.keys, np.bincount(pairs // max(1, self.num_images))))

    def look_up(self, sentences: Sequence[Words]) -> Iterator[tuple[_Occurrences, IntArray]]:
        """Find all n-grams of other sentences.

        Yields:
            For each order, the n-grams, and the document frequency of each distinct one; 0 if the corpus does not have
            it.
        """
        words: dict[str, int] = {}
        known_prefix = np.zeros(1, dtype=np.int64)  # id in the corpus of each n-gram of the order below, or -1
        for occurrences, (keys, counts) in zip(_ngrams(sentences, words), self._tables, strict=True):
            known_word = np.array([self._word_ids.get(word, -1) for word in words], dtype=np.int64)
            prefix, last_word = np.divmod(occurrences.keys, max(1, len(words)))
            prefix, last_word = known_prefix[prefix], known_word[last_word]
            key = np.where((prefix < 0) | (last_word < 0), -1, prefix * len(self._word_ids) + last_word)
            index = np.searchsorted(keys, key)
            is_known = np.append(keys, -2)[index] == key
            known_prefix = np.where(is_known, index, -1)
            yield occurrences, np.append(counts, 0)[index] * is_known


def cider(
    hypotheses: Sequence[Words],
    references: Sequence[Sequence[Words]],
    document_frequencies: DocumentFrequencies | None = None,
) -> CiderScores:
    """Compute CIDEr-D and CIDEr of each image, both times `SCALE`.

    For each n from 1 to `MAX_ORDER`, the vector of a sentence has a component for each n-gram: its count times
    log(D / df), where df is the number of the D images with the n-gram in a reference. The score is the cosine of
    hypothesis and reference, averaged over n and references. CIDEr-D clips the hypothesis to the reference and
    multiplies by exp(-(difference in length)^2 / (2 SIGMA^2)). A corpus for which the scores are not defined scores 0.
    Unlike in the paper, words are not stemmed.

    Args:
        hypotheses: One tokenized caption for each of N images.
        references: The tokenized references of each image.
        document_frequencies: Document frequencies of another corpus; None counts those of `references`, so that D is N.

    Raises:
        ValueError: There are no images, or one has no reference.
    """
    check_corpus(hypotheses, references)
    num_images = len(hypotheses)
    num_references = np.array([len(captions) for captions in references])  # [N]
    reference_image = np.repeat(np.arange(num_images), num_references)  # [R]: index of the image
    sentence_image = np.concatenate([np.arange(num_images), reference_image])  # [S]: index of the image
    sentences = [*hypotheses, *chain.from_iterable(references)]
    lengths = np.array([len(words) for words in sentences])  # [S]

    cider_sum, cider_d_sum = np.zeros(len(reference_image)), np.zeros(len(reference_image))  # [R]
    for occurrences, idf in _inverse_document_frequencies(sentences, sentence_image, num_images, document_frequencies):
        cosine, clipped_cosine = _cosines(occurrences, idf, sentence_image, num_images)
        cider_sum += cosine
        cider_d_sum += clipped_cosine
    length_difference = lengths[num_images:] - lengths[reference_image]  # [R]
    cider_d_sum *= np.exp(-(length_difference**2) / (2 * SIGMA**2))

    factor = SCALE / (MAX_ORDER * num_references)  # [N]
    return CiderScores(
        cider_d=factor * np.bincount(reference_image, cider_d_sum),
        cider=factor * np.bincount(reference_image, cider_sum),
    )


def is_defined(references: Sequence[Sequence[Words]]) -> bool:
    """Return whether CIDEr and CIDEr-D are defined: whether any n-gram of the references has a weight above 0.

    log(D / df) is 0 for one image, and if all images have the same n-grams in their references.

    Args:
        references: The tokenized references of each of N images.
    """
    image_ngrams = ({ngram for words in captions for ngram in ngrams(words, MAX_ORDER)} for captions in references)
    first = next(image_ngrams)
    return any(other != first for other in image_ngrams)


def _ngrams(sentences: Sequence[Words], word_ids: dict[str, int]) -> Iterator[_Occurrences]:
    """Find all n-grams of the sentences, for each order from 1 to `MAX_ORDER`.

    Args:
        sentences: S tokenized sentences.
        word_ids: Empty; receives the id of each word.
    """
    lengths = np.array([len(words) for words in sentences], dtype=np.int64)  # [S]
    word_id = np.array(
        [word_ids.setdefault(word, len(word_ids)) for words in sentences for word in words], dtype=np.int64
    )
    sentence_index = np.repeat(np.arange(len(sentences)), lengths)  # of each word
    end = np.cumsum(lengths)[sentence_index]  # of each word, the end of its sentence
    start, ngram_id = np.arange(len(word_id)), word_id  # [G]
    yield _Occurrences(sentence_index, ngram_id, np.arange(len(word_ids)))
    for order in range(2, MAX_ORDER + 1):
        fits = start + order <= end[start]
        start = start[fits]
        key = ngram_id[fits] * len(word_ids) + word_id[start + order - 1]
        # New consecutive ids, so that the product stays within int64 at any order.
        keys, ngram_id = np.unique(key, return_inverse=True)
        yield _Occurrences(sentence_index[start], ngram_id, keys)


def _inverse_document_frequencies(
    sentences: Sequence[Words],
    sentence_image: IntArray,
    num_images: int,
    document_frequencies: DocumentFrequencies | None,
) -> Iterator[tuple[_Occurrences, FloatArray]]:
    """Yield the n-grams of each order, and the inverse document frequency of each distinct one, [num_ngrams].

    Args:
        sentences: S tokenized sentences.
        sentence_image: Index of the image of each sentence, [S].
        num_images: N; the first N sentences are the hypotheses, which are not counted.
        document_frequencies: As for `cider`.
    """
    if document_frequencies is not None:
        for occurrences, frequency in document_frequencies.look_up(sentences):
            yield occurrences, np.log(document_frequencies.num_images) - np.log(np.maximum(frequency, 1))
        return
    for occurrences in _ngrams(sentences, {}):
        is_reference = occurrences.sentence_index >= num_images
        image = sentence_image[occurrences.sentence_index[is_reference]]
        pairs = np.unique(occurrences.id[is_reference] * num_images + image)
        frequency = np.bincount(pairs // num_images, minlength=len(occurrences.keys))
        yield occurrences, np.log(num_images) - np.log(np.maximum(frequency, 1))


def _cosines(
    occurrences: _Occurrences, idf: FloatArray, sentence_image: IntArray, num_images: int
) -> tuple[FloatArray, FloatArray]:
    """Compute the cosine of each reference with the hypothesis of its image.

    Args:
        occurrences: The n-grams of one order.
        idf: Inverse document frequency of each n-gram, [num_ngrams].
        sentence_image: Index of the image of each sentence, [S].
        num_images: N.

    Returns:
        The cosines of CIDEr and the clipped ones of CIDEr-D, each [R].
    """
    num_ngrams = max(1, len(occurrences.keys))
    # One key for each pair of sentence and n-gram.
    key, count = np.unique(occurrences.sentence_index * num_ngrams + occurrences.id, return_counts=True)  # [K]
    sentence_index, ngram_id = np.divmod(key, num_ngrams)  # [K]
    num_keys = int(np.searchsorted(sentence_index, num_images))  # keys of hypotheses, which precede the references
    # Hypothesis i belongs to image i, so image and n-gram of a reference give the key of the n-gram in the hypothesis.
    hypothesis_key = sentence_image[sentence_index[num_keys:]] * num_ngrams + ngram_id[num_keys:]
    weight = count * idf[ngram_id]  # [K]
    norm = np.sqrt(np.bincount(sentence_index, weight**2, minlength=len(sentence_image)))  # [S]

    index = np.searchsorted(key[:num_keys], hypothesis_key)
    # Keys of references whose n-gram the hypothesis has too; -1 is never a key.
    shared = np.flatnonzero(np.append(key[:num_keys], -1)[index] == hypothesis_key)
    hypothesis_weight, reference_weight = weight[index[shared]], weight[num_keys + shared]
    reference_index = sentence_index[num_keys + shared] - num_images
    norm_product = norm[num_images:] * norm[sentence_image[num_images:]]  # [R]
    norm_product[norm_product == 0] = 1.0

    def cosine(products: FloatArray) -> FloatArray:
        cosines: FloatArray = np.bincount(reference_index, products, minlength=len(norm_product)) / norm_product
        return cosines

    return (
        cosine(hypothesis_weight * reference_weight),
        cosine(np.minimum(hypothesis_weight, reference_weight) * reference_weight),
    )
