"""CIDEr and CIDEr-D: consensus of a caption with its references, by tf-idf weighted n-grams (Vedantam et al. 2015).

Legend: `N` images, `R` references of all images, `S` sentences, `G` occurrences of n-grams, `K` distinct pairs of
sentence and n-gram.
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


class _Pairs(NamedTuple):
    """The pairs of a sentence and one of its n-grams of one order, sorted by n-gram, then by image."""

    sentence_index: IntArray
    """Sentence of each pair, [K]."""
    num_occurrences: IntArray
    """How often the sentence has the n-gram, [K]."""
    group: IntArray
    """Number of the pair of n-gram and image, ascending, [K]."""
    ngram_id: IntArray
    """N-gram of each group, ascending, [groups]."""
    idf: FloatArray | None
    """Inverse document frequency of each n-gram in another corpus; None if that of the references counts."""


class SentenceIndex:
    """The n-grams of the captions of some images, counted once for several choices of hypotheses and references."""

    def __init__(
        self,
        sentences: Sequence[Words],
        sentence_image: IntArray,
        document_frequencies: DocumentFrequencies | None = None,
    ) -> None:
        """Count the n-grams.

        Args:
            sentences: S tokenized captions.
            sentence_image: Index of the image of each, [S], from 0 to N - 1.
            document_frequencies: As for `cider`.
        """
        self._sentence_image = sentence_image
        self._lengths = np.array([len(words) for words in sentences])  # [S]
        self._by_image = np.argsort(sentence_image, kind="stable")  # [S]
        self._rank = np.empty_like(self._by_image)  # position of each sentence in `_by_image`, [S]
        self._rank[self._by_image] = np.arange(len(sentences))
        self._orders: list[_Pairs] = []
        if document_frequencies is None:
            for occurrences in _ngrams(sentences, {}):
                self._orders.append(self._pair(occurrences, None))
        else:
            for occurrences, frequency in document_frequencies.look_up(sentences):
                idf = np.log(document_frequencies.num_images) - np.log(np.maximum(frequency, 1))
                self._orders.append(self._pair(occurrences, idf))

    def _pair(self, occurrences: _Occurrences, idf: FloatArray | None) -> _Pairs:
        rank = self._rank[occurrences.sentence_index]  # [G]
        key, count = np.unique(occurrences.id * len(self._rank) + rank, return_counts=True)  # [K]
        ngram_id, rank = np.divmod(key, len(self._rank))
        sentence_index = self._by_image[rank]
        image = self._sentence_image[sentence_index]
        is_first = (np.diff(ngram_id, prepend=-1) != 0) | (np.diff(image, prepend=-1) != 0)
        return _Pairs(sentence_index, count, np.cumsum(is_first) - 1, ngram_id[is_first], idf)

    def score(self, hypotheses: IntArray, references: IntArray) -> CiderScores:
        """Compute CIDEr-D and CIDEr of each image, as `cider` does.

        Args:
            hypotheses: Index of the hypothesis of each image in the sentences, [N].
            references: Indices of the references of all images, [R]; at least one of each image.
        """
        image = self._sentence_image[references]  # [R]
        cider_sum, cider_d_sum = np.zeros(len(references)), np.zeros(len(references))  # [R]
        for pairs in self._orders:
            cosine, clipped_cosine = self._cosines(pairs, hypotheses, references)
            cider_sum += cosine
            cider_d_sum += clipped_cosine
        length_difference = self._lengths[references] - self._lengths[hypotheses[image]]  # [R]
        cider_d_sum *= np.exp(-(length_difference**2) / (2 * SIGMA**2))
        factor = SCALE / (MAX_ORDER * np.bincount(image))  # [N]
        return CiderScores(
            cider_d=factor * np.bincount(image, cider_d_sum), cider=factor * np.bincount(image, cider_sum)
        )

    def _cosines(self, pairs: _Pairs, hypotheses: IntArray, references: IntArray) -> tuple[FloatArray, FloatArray]:
        """Compute the cosine of each reference with the hypothesis of its image.

        Returns:
            The cosines of CIDEr and the clipped ones of CIDEr-D, each [R].
        """
        num_sentences, num_groups = len(self._lengths), len(pairs.ngram_id)
        is_hypothesis, is_reference = (np.zeros(num_sentences, dtype=bool) for _ in range(2))  # [S]
        is_hypothesis[hypotheses], is_reference[references] = True, True
        of_hypothesis, of_reference = (
            np.flatnonzero(chosen[pairs.sentence_index]) for chosen in (is_hypothesis, is_reference)
        )
        idf = pairs.idf
        if idf is None:
            has_reference = np.zeros(num_groups, dtype=bool)
            has_reference[pairs.group[of_reference]] = True
            frequency = np.bincount(pairs.ngram_id[has_reference], minlength=int(pairs.ngram_id.max(initial=-1)) + 1)
            idf = np.log(len(hypotheses)) - np.log(np.maximum(frequency, 1))
        weight = pairs.num_occurrences * idf[pairs.ngram_id[pairs.group]]  # [K]
        norm = np.sqrt(np.bincount(pairs.sentence_index, weight**2, minlength=num_sentences))  # [S]

        # The weight of each pair of n-gram and image in the hypothesis, 0 where the hypothesis lacks the n-gram.
        hypothesis_weight = np.zeros(num_groups)
        hypothesis_weight[pairs.group[of_hypothesis]] = weight[of_hypothesis]
        hypothesis_weight = hypothesis_weight[pairs.group[of_reference]]
        reference_weight, sentence_index = weight[of_reference], pairs.sentence_index[of_reference]
        norm_product = norm[references] * norm[hypotheses[self._sentence_image[references]]]  # [R]
        norm_product[norm_product == 0] = 1.0

        def cosine(products: FloatArray) -> FloatArray:
            sums = np.bincount(sentence_index, products, minlength=num_sentences)  # [S]
            cosines: FloatArray = sums[references] / norm_product
            return cosines

        return (
            cosine(hypothesis_weight * reference_weight),
            cosine(np.minimum(hypothesis_weight, reference_weight) * reference_weight),
        )


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
    reference_image = np.repeat(np.arange(num_images), [len(captions) for captions in references])
    index = SentenceIndex(
        [*hypotheses, *chain.from_iterable(references)],
        np.concatenate([np.arange(num_images), reference_image]),
        document_frequencies,
    )
    return index.score(np.arange(num_images), num_images + np.arange(len(reference_image)))


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
