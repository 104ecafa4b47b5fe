import csv
import math
import re
import time
from collections import Counter
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from pipeline.metrics.bleu import bleu, bleu_counts
from pipeline.metrics.cider import cider
from pipeline.metrics.corpus import LIBRARY
from pipeline.metrics.meteor import meteor_counts
from pipeline.metrics.rouge import rouge_l
from pipeline.metrics.spice import spice
from pipeline.metrics.token_accuracy import token_scores

ROOT = Path(__file__).parents[1]
REAL_CAPTIONS = ROOT.parent / "shared/real/text/flickr8k_captions.csv"


def corpus(*images: tuple[str, ...]) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Hypotheses and references from one tuple an image: the hypothesis, then its references."""
    hypotheses = [image[0].split() for image in images]
    references = [[caption.split() for caption in image[1:]] for image in images]
    return hypotheses, references


def for_coco(hypotheses, references):
    """References and results in the form that pycocoevalcap takes."""
    gts = {index: [" ".join(words) for words in captions] for index, captions in enumerate(references)}
    return gts, {index: [" ".join(words)] for index, words in enumerate(hypotheses)}


def assert_equal_to_coco(hypotheses, references):
    gts, res = for_coco(hypotheses, references)
    counts = bleu_counts(hypotheses, references).sum(axis=0)
    wanted_bleu = np.array(Bleu(4).compute_score(gts, res, verbose=0)[0])
    np.testing.assert_allclose(bleu(counts), wanted_bleu, atol=1e-9)

    mean, per_image = Cider().compute_score(gts, res)
    np.testing.assert_allclose(cider(hypotheses, references).cider_d, per_image, atol=1e-6)
    assert cider(hypotheses, references).cider_d.mean() == pytest.approx(mean, abs=1e-6)

    mean, per_image = Rouge().compute_score(gts, res)
    np.testing.assert_allclose(rouge_l(hypotheses, references), per_image, atol=1e-6)
    assert rouge_l(hypotheses, references).mean() == pytest.approx(mean, abs=1e-6)


def real_corpus(images: int):
    """First human caption of a photograph against its other four."""
    if not REAL_CAPTIONS.is_file():
        pytest.skip(f"no real captions at {REAL_CAPTIONS}")
    with REAL_CAPTIONS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    grouped = [list(group) for _, group in groupby(rows, key=lambda row: row["image"])][:images]
    words = [[re.findall("[a-z0-9]+", row["caption"].lower()) for row in group] for group in grouped]
    return [captions[0] for captions in words], [captions[1:] for captions in words]


captions = st.lists(st.sampled_from("abcde"), min_size=1, max_size=9)
images = st.tuples(st.just([]) | captions, st.lists(captions, min_size=1, max_size=4))


@pytest.mark.parametrize(
    ("images", "wanted"),
    [
        pytest.param([("a b c d", "a b c d")], [1, 1, 1, 1], id="the same"),
        pytest.param([("a b c d", "e f g h")], [0, 0, 0, 0], id="no match"),
        pytest.param([("", "a b")], [0, 0, 0, 0], id="empty hypothesis"),
        pytest.param([("", "")], [0, 0, 0, 0], id="empty hypothesis and reference"),
        pytest.param(
            [("the the the the the the the", "the cat is on the mat", "there is a cat on the mat")],
            [2 / 7, 0, 0, 0],
            id="repeated word counts as often as in one reference",
        ),
        pytest.param(
            [("a b", "a b c d")], [math.exp(-1) * share for share in (1, 1, 1e-2, 1e-3)], id="too short for two orders"
        ),
        pytest.param([("a b c d", "a b x", "c d x y z")], [1, (2 / 3) ** 0.5, 0, 0], id="tie to the shorter"),
        pytest.param([("a", "a b c"), ("d e f", "d")], [1 / 2, 0, 0, 0], id="lengths add up over the corpus"),
        pytest.param(
            [("a b c d", "a b c d"), ("a b", "x y", "b", "z")],
            [5 / 6, *((5 / 8) ** (1 / n) for n in (2, 3, 4))],
            id="unlike numbers",
        ),
        pytest.param([("<unk> b", "a b")], [1 / 2, 0, 0, 0], id="unknown word never matches"),
    ],
)
def test_bleu(images, wanted):
    hypotheses, references = corpus(*images)
    scores = bleu(bleu_counts(hypotheses, references).sum(axis=0))
    assert scores == pytest.approx(wanted, abs=1e-5)


def test_bleu_counts_are_matches_then_ngrams_then_closest_length():
    hypotheses, references = corpus(("a b c c", "a b x", "c d x y z"))
    assert bleu_counts(hypotheses, references).tolist() == [[3, 1, 0, 0, 4, 3, 2, 1, 3]]


def test_bleu_of_many_resamples_at_once():
    counts = bleu_counts(*corpus(("a b c d e", "a b c d"), ("a b c", "a c"), ("x", "y z")))
    bootstrap_samples = np.array([[0, 1, 2], [0, 0, 1], [2, 2, 2]])
    at_once = bleu(counts[bootstrap_samples].sum(axis=1))
    one_by_one = [bleu(counts[rows].sum(axis=0)) for rows in bootstrap_samples]
    np.testing.assert_array_equal(at_once, one_by_one)
    assert len(np.unique(at_once[:, 0])) == 3


@pytest.mark.parametrize(
    ("images", "wanted"),
    [
        pytest.param([("a b c d", "a b c d"), ("e f g h", "e f g h")], [10, 10], id="the same"),
        pytest.param([("e f g h", "a b c d"), ("a b c d", "e f g h")], [0, 0], id="no match"),
        pytest.param([("", "a b c d"), ("e", "e")], [0, 10 / 4], id="empty hypothesis; one word has no 2-grams"),
        pytest.param([("a b c d", "a b c d")], [0], id="nothing sets a single image apart"),
        pytest.param([("a b", "a b", "c"), ("x", "y")], [10 / 4, 0], id="mean over references and orders"),
        pytest.param([("a", "a", ""), ("", "x", "y", "z")], [10 / 8, 0], id="unlike numbers, empty reference"),
    ],
)
def test_cider_and_cider_d_agree_where_nothing_is_repeated_and_lengths_are_alike(images, wanted):
    scores = cider(*corpus(*images))
    assert scores.cider_d == pytest.approx(wanted)
    assert scores.cider == pytest.approx(wanted)


def test_cider_d_holds_repetition_and_length_against_a_caption():
    scores = cider(*corpus(("a a a", "a"), ("b", "c")))
    assert scores.cider[0] == pytest.approx(10 / 4)
    assert scores.cider_d[0] == pytest.approx(10 / 4 / 3 * math.exp(-4 / 72))


def textbook_cider(hypotheses, references):
    """CIDEr image by image and vector by vector, as the paper writes it."""

    def ngrams(words, order):
        return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))

    def vector(words, order, documents):
        return {
            ngram: count * (math.log(len(references)) - math.log(max(1, documents[ngram])))
            for ngram, count in ngrams(words, order).items()
        }

    scores = np.zeros(len(hypotheses))
    for order in range(1, 5):
        documents = Counter(
            ngram for own in references for ngram in {ngram for words in own for ngram in ngrams(words, order)}
        )
        for place, (words, own) in enumerate(zip(hypotheses, references, strict=True)):
            first = vector(words, order, documents)
            for other in (vector(reference, order, documents) for reference in own):
                norms = math.hypot(*first.values()) * math.hypot(*other.values())
                product = sum(weight * other.get(ngram, 0.0) for ngram, weight in first.items())
                scores[place] += 10 / 4 / len(own) * (product / norms if norms else 0.0)
    return scores


@given(st.lists(images, min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_cider_without_the_d_is_that_of_the_paper(pairs):
    hypotheses, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    np.testing.assert_allclose(cider(hypotheses, references).cider, textbook_cider(hypotheses, references), atol=1e-6)


def test_cider_without_the_d_is_that_of_the_paper_on_real_captions():
    hypotheses, references = real_corpus(100)
    np.testing.assert_allclose(cider(hypotheses, references).cider, textbook_cider(hypotheses, references), atol=1e-6)


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        pytest.param(("a b c", "a b c"), 1, id="the same"),
        pytest.param(("a b", "c d"), 0, id="no match"),
        pytest.param(("", "a"), 0, id="empty hypothesis"),
        pytest.param(("a", "", "a"), 1, id="one reference empty"),
        pytest.param(("a x c", "a b c d"), 2.44 * (2 / 3) * (1 / 2) / (1 / 2 + 1.44 * 2 / 3), id="gap"),
        pytest.param(("a b c d", "d c b a"), 1 / 4, id="order counts"),
        pytest.param(("a b", "a b c d", "b"), 1, id="best precision and best recall of different references"),
    ],
)
def test_rouge_l(image, wanted):
    assert rouge_l(*corpus(image)).tolist() == [pytest.approx(wanted)]


@pytest.mark.parametrize("score", [bleu_counts, cider, rouge_l, meteor_counts, spice])
@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([["a"], ["b"]], [[["a"]], []], "index 1 has no reference"),
        ([["a"]], [[["a"]], [["b"]]], "1 hypotheses but references for 2 images"),
        ([], [], "no images"),
    ],
)
def test_faulty_corpus_is_refused(score, hypotheses, references, message):
    with pytest.raises(ValueError, match=message):
        score(hypotheses, references)


@given(st.lists(images, min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_random_corpora_score_as_in_coco_caption(pairs):
    assert_equal_to_coco([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def test_real_captions_score_as_in_coco_caption():
    assert_equal_to_coco(*real_corpus(300))


def test_cider_takes_at_most_half_the_time_of_coco_caption():
    hypotheses, references = real_corpus(1000)
    gts, res = for_coco(hypotheses, references)
    start = time.process_time()
    cider(hypotheses, references)
    between = time.process_time()
    Cider().compute_score(gts, res)
    assert between - start < (time.process_time() - between) / 2


@pytest.mark.parametrize(
    ("predicted", "target", "wanted"),
    [
        pytest.param([1, 2, 3], [1, 2, 3], (1, 1, 1), id="all right"),
        pytest.param([2, 1], [1, 2], (0, 0, 0), id="all wrong"),
        # F1 of class 0: right 2, predicted 3, targets 3; class 1: right 1, predicted 1, targets 2.
        pytest.param([0, 0, 1, 0, 7], [0, 0, 1, 1, 0], (3 / 5, 2 / 3, 2 / 3), id="class 7 only predicted"),
        pytest.param([0, 0, 0, 0], [0, 0, 0, 1], (3 / 4, (6 / 7) / 2, (6 / 7) * 3 / 4), id="rare class missed"),
    ],
)
def test_token_scores(predicted, target, wanted):
    scores = token_scores(np.array(predicted), np.array(target))
    assert (scores.accuracy, scores.macro_f1, scores.weighted_f1) == pytest.approx(wanted)


@pytest.mark.parametrize(("predicted", "target"), [([], []), ([1], [1, 2]), ([[1]], [[1]]), ([-1], [0])], ids=str)
def test_token_scores_refuse_what_is_no_pair_of_flat_arrays(predicted, target):
    with pytest.raises(ValueError, match=r"flat arrays|>= 0"):
        token_scores(np.array(predicted, dtype=np.int64), np.array(target, dtype=np.int64))


def test_scores_name_the_version_of_the_package():
    assert f"gridcap {version('gridcap')}" == LIBRARY
