import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from pycocoevalcap.cider.cider import Cider

from pipeline.metrics.cider import DocumentFrequencies, cider, is_defined
from tests.caption_corpora import flickr8k_corpus, make_corpus, random_corpora, to_pycocoevalcap


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        pytest.param([("a b c d", "a b c d"), ("e f g h", "e f g h")], [10, 10], id="identical"),
        pytest.param([("e f g h", "a b c d"), ("a b c d", "e f g h")], [0, 0], id="no match"),
        pytest.param([("", "a b c d"), ("e", "e")], [0, 10 / 4], id="empty hypothesis, and one word without 2-grams"),
        pytest.param([("a b c d", "a b c d")], [0], id="a single image has no informative n-grams"),
        pytest.param([("a b", "a b", "c"), ("x", "y")], [10 / 4, 0], id="mean over references and orders"),
        pytest.param([("a", "a", ""), ("", "x", "y", "z")], [10 / 8, 0], id="varying number of references, one empty"),
    ],
)
def test_cider_equals_cider_d_without_repetition_and_with_equal_lengths(images, expected):
    scores = cider(*make_corpus(*images))
    assert scores.cider_d == pytest.approx(expected)
    assert scores.cider == pytest.approx(expected)


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ([["a b"]], False),
        ([["a b", "c"], ["c", "a b"]], False),
        ([["a b"], ["b a"]], True),
        ([["a"], ["b"]], True),
    ],
)
def test_cider_is_defined_if_an_ngram_tells_images_apart(references, expected):
    captions = [[text.split() for text in image] for image in references]
    assert is_defined(captions) == expected
    # Otherwise even a perfect caption scores 0.
    assert (cider([image[0] for image in captions], captions).cider.max() > 0) == expected


def test_cider_d_penalizes_repetition_and_length():
    scores = cider(*make_corpus(("a a a", "a"), ("b", "c")))
    assert scores.cider[0] == pytest.approx(10 / 4)
    assert scores.cider_d[0] == pytest.approx(10 / 4 / 3 * math.exp(-4 / 72))


def reference_cider(hypotheses, references):
    """Compute CIDEr image by image and vector by vector, as in the paper."""

    def ngrams(words, order):
        return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))

    def vector(words, order, document_frequency):
        return {
            ngram: count * (math.log(len(references)) - math.log(max(1, document_frequency[ngram])))
            for ngram, count in ngrams(words, order).items()
        }

    scores = np.zeros(len(hypotheses))
    for order in range(1, 5):
        document_frequency = Counter(
            ngram
            for captions in references
            for ngram in {ngram for words in captions for ngram in ngrams(words, order)}
        )
        for index, (words, captions) in enumerate(zip(hypotheses, references, strict=True)):
            hypothesis = vector(words, order, document_frequency)
            for reference in (vector(caption, order, document_frequency) for caption in captions):
                norms = math.hypot(*hypothesis.values()) * math.hypot(*reference.values())
                product = sum(weight * reference.get(ngram, 0.0) for ngram, weight in hypothesis.items())
                scores[index] += 10 / 4 / len(captions) * (product / norms if norms else 0.0)
    return scores


def assert_cider_equals_paper(hypotheses, references):
    np.testing.assert_allclose(cider(hypotheses, references).cider, reference_cider(hypotheses, references), atol=1e-6)


@given(random_corpora)
@settings(max_examples=50)
def test_cider_follows_the_paper(corpus):
    assert_cider_equals_paper(*corpus)


@pytest.mark.slow
def test_cider_of_real_captions_follows_the_paper():
    assert_cider_equals_paper(*flickr8k_corpus(100))


def assert_cider_d_equals_pycocoevalcap(hypotheses, references):
    mean, per_image = Cider().compute_score(*to_pycocoevalcap(hypotheses, references))
    scores = cider(hypotheses, references).cider_d
    np.testing.assert_allclose(scores, per_image, atol=1e-6)
    assert scores.mean() == pytest.approx(mean, abs=1e-6)


@given(random_corpora)
@settings(max_examples=100)
def test_random_corpora_score_as_in_pycocoevalcap(corpus):
    assert_cider_d_equals_pycocoevalcap(*corpus)


@pytest.mark.slow
def test_real_captions_score_as_in_pycocoevalcap():
    assert_cider_d_equals_pycocoevalcap(*flickr8k_corpus(300))


@given(random_corpora)
@settings(max_examples=100)
def test_document_frequencies_of_the_same_corpus_change_nothing(corpus):
    hypotheses, references = corpus
    expected, actual = cider(hypotheses, references), cider(hypotheses, references, DocumentFrequencies(references))
    np.testing.assert_array_equal(actual.cider_d, expected.cider_d)
    np.testing.assert_array_equal(actual.cider, expected.cider)


@given(random_corpora)
@settings(max_examples=100)
def test_document_frequencies_of_a_larger_corpus_score_each_image_alone(corpus):
    hypotheses, references = corpus
    frequencies = DocumentFrequencies(references)
    alone = [cider([h], [r], frequencies).cider_d[0] for h, r in zip(hypotheses, references, strict=True)]
    np.testing.assert_allclose(alone, cider(hypotheses, references).cider_d, atol=1e-9)


def test_n_grams_that_the_other_corpus_lacks_are_as_rare_as_those_of_one_image():
    frequencies = DocumentFrequencies([[["a", "b", "c", "d"]], [["a", "b", "x", "y"]], [["z", "z", "z", "z"]]])
    unknown = cider([["p", "q", "r", "s"]], [[["p", "q", "r", "s"], ["a", "b", "c", "d"]]], frequencies)
    assert unknown.cider_d == pytest.approx([10 / 2])
    partly = cider([["a", "b"]], [[["a", "c"]]], frequencies).cider[0]
    a, b, c = math.log(3 / 2), math.log(3 / 2), math.log(3)
    assert partly == pytest.approx(10 / 4 * a**2 / (math.hypot(a, b) * math.hypot(a, c)))
