import math

import numpy as np
import pytest
from hypothesis import given, settings
from pycocoevalcap.bleu.bleu import Bleu

from pipeline.metrics.bleu import bleu, bleu_counts
from tests.caption_corpora import flickr8k_corpus, make_corpus, random_corpora, to_pycocoevalcap


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        pytest.param([("a b c d", "a b c d")], [1, 1, 1, 1], id="identical"),
        pytest.param([("a b c d", "e f g h")], [0, 0, 0, 0], id="no match"),
        pytest.param([("", "a b")], [0, 0, 0, 0], id="empty hypothesis"),
        pytest.param([("", "")], [0, 0, 0, 0], id="empty hypothesis and reference"),
        pytest.param(
            [("the the the the the the the", "the cat is on the mat", "there is a cat on the mat")],
            [2 / 7, 0, 0, 0],
            id="repeated word is clipped to one reference",
        ),
        pytest.param(
            [("a b", "a b c d")],
            [math.exp(-1) * mean_precision for mean_precision in (1, 1, 1e-2, 1e-3)],
            id="too short for orders 3 and 4",
        ),
        pytest.param([("a b c d", "a b x", "c d x y z")], [1, (2 / 3) ** 0.5, 0, 0], id="shorter reference wins a tie"),
        pytest.param([("a", "a b c"), ("d e f", "d")], [1 / 2, 0, 0, 0], id="lengths are summed over the corpus"),
        pytest.param(
            [("a b c d", "a b c d"), ("a b", "x y", "b", "z")],
            [5 / 6, *((5 / 8) ** (1 / n) for n in (2, 3, 4))],
            id="varying number of references",
        ),
        pytest.param([("<unk> b", "a b")], [1 / 2, 0, 0, 0], id="unknown word never matches"),
    ],
)
def test_bleu(images, expected):
    hypotheses, references = make_corpus(*images)
    scores = bleu(bleu_counts(hypotheses, references).sum(axis=0))
    assert scores == pytest.approx(expected, abs=1e-5)


def test_counts_are_matches_then_ngrams_then_closest_length():
    hypotheses, references = make_corpus(("a b c c", "a b x", "c d x y z"))
    assert bleu_counts(hypotheses, references).tolist() == [[3, 1, 0, 0, 4, 3, 2, 1, 3]]


def test_bleu_of_several_bootstrap_samples_at_once():
    counts = bleu_counts(*make_corpus(("a b c d e", "a b c d"), ("a b c", "a c"), ("x", "y z")))
    samples = np.array([[0, 1, 2], [0, 0, 1], [2, 2, 2]])
    scores = bleu(counts[samples].sum(axis=1))
    np.testing.assert_array_equal(scores, [bleu(counts[rows].sum(axis=0)) for rows in samples])
    assert len(np.unique(scores[:, 0])) == 3


def assert_equal_to_pycocoevalcap(hypotheses, references):
    gts, res = to_pycocoevalcap(hypotheses, references)
    expected = np.array(Bleu(4).compute_score(gts, res, verbose=0)[0])
    np.testing.assert_allclose(bleu(bleu_counts(hypotheses, references).sum(axis=0)), expected, atol=1e-9)


@given(random_corpora)
@settings(max_examples=100)
def test_random_corpora_score_as_in_pycocoevalcap(corpus):
    assert_equal_to_pycocoevalcap(*corpus)


@pytest.mark.slow
def test_real_captions_score_as_in_pycocoevalcap():
    assert_equal_to_pycocoevalcap(*flickr8k_corpus(300))
