"""Scores of a small corpus with intervals, subsets, protocols and signatures."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics.bleu import bleu, bleu_counts
from pipeline.metrics.bootstrap import Resampling
from pipeline.metrics.caption_scores import (
    CORPUS_SCORES,
    compute_metrics,
    per_image_scores,
    summarize_scores,
)
from pipeline.metrics.cider import cider
from pipeline.metrics.corpus import LIBRARY_TAG, Corpus
from pipeline.metrics.ptb import PTB
from pipeline.metrics.rouge import rouge_l
from pipeline.metrics.tokenizers import SPACY
from tests.caption_corpora import images, small_corpus
from tests.imports import imported_packages
from tests.java_programs import needs_java

RESAMPLING = Resampling(bootstrap_samples=300, seed=5)

CORPUS = small_corpus()


def test_scores_equal_those_of_the_metric_modules() -> None:
    scores = summarize_scores(compute_metrics(CORPUS, with_meteor=False, with_spice=False), {}, RESAMPLING)
    hypotheses, references = CORPUS.hypotheses, CORPUS.references
    expected = {
        f"BLEU-{order}": value
        for order, value in enumerate(bleu(bleu_counts(hypotheses, references).sum(axis=0)), start=1)
    }
    expected["ROUGE-L"] = rouge_l(hypotheses, references).mean()
    expected["CIDEr-D"] = cider(hypotheses, references).cider_d.mean()
    expected["CIDEr"] = cider(hypotheses, references).cider.mean()
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert scores["num_images"] == 4
    for name in expected:
        low, high = scores["intervals"][name]
        assert low <= scores[name] <= high
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_every_score_has_a_protocol() -> None:
    scores = summarize_scores(compute_metrics(CORPUS, with_meteor=False, with_spice=False), {}, RESAMPLING)
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D", "CIDEr"):
        keys = {line.partition(": ")[0] for line in scores["protocol"][name]}
        assert {"metric", "library", "average", "smoothing", "tokenizer", "references per image"} <= keys, name
    assert any(line.startswith("brevity: closest") for line in scores["protocol"]["BLEU-4"])
    assert "300 samples, seed 5" in scores["protocol"]["intervals"][0]
    assert scores["unavailable"] == {"METEOR": ["disabled"], "SPICE": ["disabled"]}


TOKENIZATION = "|".join(f"{key}:{value}" for key, value in SPACY.signature.items())


@pytest.mark.parametrize(
    ("metric", "signature"),
    [
        ("BLEU-1", f"BLEU-1|refs:1-3|{TOKENIZATION}|smooth:none|brevity:closest|lib:{LIBRARY_TAG}"),
        ("BLEU-4", f"BLEU-4|refs:1-3|{TOKENIZATION}|smooth:none|brevity:closest|lib:{LIBRARY_TAG}"),
        ("ROUGE-L", f"ROUGE-L|refs:1-3|{TOKENIZATION}|beta:1.2|lib:{LIBRARY_TAG}"),
        ("CIDEr-D", f"CIDEr-D|refs:1-3|{TOKENIZATION}|n:4|sigma:6|df:corpus|stem:no|lib:{LIBRARY_TAG}"),
        ("CIDEr", f"CIDEr|refs:1-3|{TOKENIZATION}|n:4|df:corpus|stem:no|lib:{LIBRARY_TAG}"),
    ],
)
def test_signatures(metric: str, signature: str) -> None:
    scores = summarize_scores(compute_metrics(CORPUS, with_meteor=False, with_spice=False), {}, RESAMPLING)
    # Lists, which `dvc metrics show` leaves out.
    assert scores["signature"][metric] == [signature]


def test_the_signature_gives_the_ptb_tokenizer_and_a_fixed_number_of_references() -> None:
    corpus = Corpus(image_ids=(1,), hypotheses=(["a"],), references=([["a"]] * 5,), tokenization=PTB)
    signature = compute_metrics(corpus, with_meteor=False, with_spice=False).signature["BLEU-4"]
    assert signature.startswith("BLEU-4|refs:5|tok:ptb-3.4.1|lang:en|case:lower|punct:drop|")


@needs_java
def test_meteor_of_all_images_and_of_a_subset() -> None:
    metrics = compute_metrics(CORPUS, with_meteor=True, with_spice=False)
    scores = summarize_scores(metrics, {"odd": [7, 9]}, RESAMPLING)
    assert 0.2 < scores["METEOR"] < 1
    assert scores["subsets"]["odd"]["METEOR"] != scores["METEOR"]
    assert metrics.image_scores["METEOR"].shape == (4,)
    assert scores["signature"]["METEOR"][0].endswith(f"|norm:yes|lib:meteor-1.5+{LIBRARY_TAG}")


def test_metrics_for_english_are_unavailable_in_other_languages() -> None:
    corpus = replace(CORPUS, tokenization=replace(SPACY, language="de"))
    metrics = compute_metrics(corpus, with_meteor=True, with_spice=True)
    for metric in ("METEOR", "SPICE"):
        assert metric not in metrics.tables
        assert metrics.unavailable[metric] == f"{metric} is for English, and the language of the captions is de."
    assert "|lang:de|" in metrics.signature["BLEU-4"]


def test_metrics_without_java_are_unavailable(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    metrics = compute_metrics(CORPUS, with_meteor=True, with_spice=True)
    assert not {"METEOR", "SPICE"} & metrics.tables.keys()
    assert not {"METEOR", "SPICE"} & metrics.signature.keys()
    assert "java" in metrics.unavailable["METEOR"]
    assert metrics.unavailable["SPICE"]


def test_intervals_depend_on_the_seed_alone() -> None:
    metrics = compute_metrics(CORPUS, with_meteor=False, with_spice=False)
    first, again = (summarize_scores(metrics, {}, RESAMPLING) for _ in range(2))
    reseeded = summarize_scores(metrics, {}, Resampling(bootstrap_samples=300, seed=6))
    assert first == again
    assert first["intervals"] != reseeded["intervals"]
    assert first["CIDEr-D"] == reseeded["CIDEr-D"]


def test_subsets_use_the_document_frequencies_of_all_images() -> None:
    metrics = compute_metrics(CORPUS, with_meteor=False, with_spice=False)
    scores = summarize_scores(metrics, {"odd": [7, 9], "even": [2, 4]}, RESAMPLING)
    subsets = scores["subsets"]
    assert subsets["odd"]["num_images"] == subsets["even"]["num_images"] == 2
    cider_d = cider(CORPUS.hypotheses, CORPUS.references).cider_d
    assert subsets["odd"]["CIDEr-D"] == pytest.approx(cider_d[2:].mean(), abs=1e-6)
    counts = bleu_counts(CORPUS.hypotheses, CORPUS.references)
    assert subsets["even"]["BLEU-4"] == pytest.approx(bleu(counts[:2].sum(axis=0))[3], abs=1e-6)
    assert set(scores["intervals"]["subsets"]["odd"]) == set(subsets["odd"]) - {"num_images"}


def test_scores_of_each_image() -> None:
    metrics = compute_metrics(CORPUS, with_meteor=False, with_spice=False)
    rows = per_image_scores(metrics)
    assert [row["image_id"] for row in rows] == [2, 4, 7, 9]
    assert set(rows[0]) == {"image_id", "ROUGE-L", "CIDEr-D", "CIDEr"}
    assert np.mean([row["ROUGE-L"] for row in rows]) == pytest.approx(metrics.score("ROUGE-L"), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("imports", "absent"),
    [
        ("pipeline.metrics.caption_scores, pipeline.metrics.tokenizers", "pycocoevalcap"),
        ("pipeline.metrics.bleu, pipeline.metrics.cider", "pipeline.metrics.java"),  # imported by training
    ],
)
def test_metrics_import_without_java_wrappers(imports: str, absent: str) -> None:
    assert imported_packages(f"import {imports}", [absent]) == []


@given(st.lists(images, min_size=1, max_size=4), st.randoms())
@settings(max_examples=50)
def test_scores_do_not_depend_on_the_order_of_images(pairs, random) -> None:
    def score(order):
        corpus = Corpus(
            image_ids=tuple(range(len(order))),
            hypotheses=tuple(pairs[index][0] for index in order),
            references=tuple(pairs[index][1] for index in order),
            tokenization=SPACY,
        )
        metrics = compute_metrics(corpus, with_meteor=False, with_spice=False)
        return {name: metrics.score(name) for name in metrics.tables}

    order = list(range(len(pairs)))
    expected = score(order)
    random.shuffle(order)
    assert score(order) == pytest.approx(expected)
    assert set(expected) < set(CORPUS_SCORES)
