"""CIDEr and CIDEr-D: consensus of a caption with its references, by tf-idf weighted n-grams (Vedantam et al. 2015).

Legend: `N` images, `R` references of all images, `S` = N + R sentences (the hypotheses, then the references),
`G` occurrences of n-grams, `K` distinct pairs of sentence and n-gram.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

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


def cider(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> CiderScores:
    """Compute CIDEr-D and CIDEr of each image, both times `SCALE`.

    For each n from 1 to `MAX_ORDER`, the vector of a sentence has a component for each n-gram: its count times
    log(N / df), where df is the number of images with the n-gram in a reference. The score is the cosine of hypothesis
    and reference, averaged over n and references. CIDEr-D clips the hypothesis to the reference and multiplies by
    exp(-(difference in length)^2 / (2 SIGMA^2)). A corpus for which the scores are not defined scores 0. Unlike in the
    paper, words are not stemmed.

    Args:
        hypotheses: One tokenized caption for each of N images.
        references: The tokenized references of each image.

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
    for sentence_index, ngram_id in _ngrams(sentences, lengths):
        cosine, clipped_cosine = _cosines(sentence_index, ngram_id, sentence_image, num_images)
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

    log(N / df) is 0 for one image, and if all images have the same n-grams in their references.

    Args:
        references: The tokenized references of each of N images.
    """
    image_ngrams = ({ngram for words in captions for ngram in ngrams(words, MAX_ORDER)} for captions in references)
    first = next(image_ngrams)
    return any(other != first for other in image_ngrams)


def _ngrams(sentences: Sequence[Words], lengths: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Find all n-grams of the sentences.

    Args:
        sentences: S tokenized sentences.
        lengths: Their lengths in words, [S].

    Yields:
        For each order from 1 to `MAX_ORDER`, the index of the sentence and the id of the n-gram of each occurrence,
        both [G].
    """
    vocabulary: dict[str, int] = {}
    word_id = np.array(
        [vocabulary.setdefault(word, len(vocabulary)) for words in sentences for word in words], dtype=np.int64
    )
    sentence_index = np.repeat(np.arange(len(sentences)), lengths)  # of each word
    end = np.cumsum(lengths)[sentence_index]  # of each word, the end of its sentence
    start, ngram_id = np.arange(len(word_id)), word_id  # [G]
    yield sentence_index, ngram_id
    for order in range(2, MAX_ORDER + 1):
        fits = start + order <= end[start]
        start = start[fits]
        extended_id = ngram_id[fits] * len(vocabulary) + word_id[start + order - 1]
        # New consecutive ids, so that the product stays within int64 at any order.
        ngram_id = np.unique(extended_id, return_inverse=True)[1]
        yield sentence_index[start], ngram_id


def _cosines(
    sentence_index: IntArray, ngram_id: IntArray, sentence_image: IntArray, num_images: int
) -> tuple[FloatArray, FloatArray]:
    """Compute the cosine of each reference with the hypothesis of its image.

    Args:
        sentence_index: Sentence of each n-gram occurrence, [G].
        ngram_id: Id of each n-gram occurrence, [G].
        sentence_image: Index of the image of each sentence, [S].
        num_images: N.

    Returns:
        The cosines of CIDEr and the clipped ones of CIDEr-D, each [R].
    """
    num_ngrams = int(ngram_id.max(initial=0)) + 1
    # One key for each pair of sentence and n-gram.
    key, count = np.unique(sentence_index * num_ngrams + ngram_id, return_counts=True)  # [K]
    sentence_index, ngram_id = np.divmod(key, num_ngrams)  # [K]
    num_keys = int(np.searchsorted(sentence_index, num_images))  # keys of hypotheses, which precede the references
    # Hypothesis i belongs to image i, so image and n-gram of a reference give the key of the n-gram in the hypothesis.
    hypothesis_key = sentence_image[sentence_index[num_keys:]] * num_ngrams + ngram_id[num_keys:]
    document_frequency = np.bincount(np.unique(hypothesis_key) % num_ngrams, minlength=num_ngrams)  # [num_ngrams]
    weight = count * (np.log(num_images) - np.log(np.maximum(document_frequency, 1)))[ngram_id]  # [K]
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
