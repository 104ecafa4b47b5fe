import numpy as np
import pytest
from hypothesis import given, settings
from pycocoevalcap.rouge.rouge import Rouge

from pipeline.metrics.rouge import rouge_l
from tests.caption_corpora import flickr8k_corpus, make_corpus, random_corpora, to_pycocoevalcap


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(("a b c", "a b c"), 1, id="identical"),
        pytest.param(("a b", "c d"), 0, id="no match"),
        pytest.param(("", "a"), 0, id="empty hypothesis"),
        pytest.param(("a", "", "a"), 1, id="one reference empty"),
        pytest.param(("a x c", "a b c d"), 2.44 * (2 / 3) * (1 / 2) / (1 / 2 + 1.44 * 2 / 3), id="gap"),
        pytest.param(("a b c d", "d c b a"), 1 / 4, id="order counts"),
        pytest.param(("a b", "a b c d", "b"), 1, id="best precision and best recall of different references"),
    ],
)
def test_rouge_l(image, expected):
    assert rouge_l(*make_corpus(image)).tolist() == [pytest.approx(expected)]


def assert_equal_to_pycocoevalcap(hypotheses, references):
    mean, per_image = Rouge().compute_score(*to_pycocoevalcap(hypotheses, references))
    scores = rouge_l(hypotheses, references)
    np.testing.assert_allclose(scores, per_image, atol=1e-6)
    assert scores.mean() == pytest.approx(mean, abs=1e-6)


@given(random_corpora)
@settings(max_examples=100)
def test_random_corpora_score_as_in_pycocoevalcap(corpus):
    assert_equal_to_pycocoevalcap(*corpus)


@pytest.mark.slow
def test_real_captions_score_as_in_pycocoevalcap():
    assert_equal_to_pycocoevalcap(*flickr8k_corpus(300))
