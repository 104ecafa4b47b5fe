"""Human agreement on a small corpus."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation.agreement import human_agreement
from pipeline.metrics.bleu import bleu, bleu_counts
from pipeline.metrics.bootstrap import Resampling
from pipeline.metrics.cider import cider
from tests.caption_corpora import CAPTIONS, REFERENCES, small_corpus
from tests.java_programs import needs_java

RESAMPLING = Resampling(bootstrap_samples=300, seed=5)


def test_each_reference_is_scored_against_the_others() -> None:
    scores = human_agreement(small_corpus(), with_meteor=False, resampling=RESAMPLING)
    assert scores["num_images"] == 3  # the plate of food has one reference
    # By hand: without the first, the second and the third reference of each image.
    words = {image_id: [caption.split() for caption in REFERENCES[image_id]] for image_id in (2, 4, 9)}
    words[9].append(words[9][0])  # has two references, so its third round repeats the first
    counts, cider_d = [], []
    for left_out in range(3):
        hypotheses = [captions[left_out] for captions in words.values()]
        references = [[*words[image][:left_out], *words[image][left_out + 1 :]] for image in (2, 4)]
        references.append([words[9][(left_out + 1) % 2]])
        counts.append(bleu_counts(hypotheses, references))
        cider_d.append(cider(hypotheses, references).cider_d)
    expected = bleu(np.concatenate(counts).sum(axis=0))
    assert [scores[f"BLEU-{order}"]["human"][0] for order in range(1, 5)] == pytest.approx(expected, abs=1e-6)
    assert scores["CIDEr-D"]["human"][0] == pytest.approx(np.concatenate(cider_d).mean(), abs=1e-6)
    value, low, high = scores["CIDEr-D"]["model - human"]
    assert value == pytest.approx(scores["CIDEr-D"]["model"][0] - scores["CIDEr-D"]["human"][0], abs=2e-6)
    assert low <= value <= high


def test_identical_references_score_highest() -> None:
    same = {image_id: [text] * 3 for image_id, text in CAPTIONS.items()}
    scores = human_agreement(small_corpus(same), with_meteor=False, resampling=RESAMPLING)
    assert scores["num_images"] == 4
    assert scores["ROUGE-L"]["human"] == scores["ROUGE-L"]["model"] == [1, 1, 1]
    assert scores["BLEU-1"]["model - human"] == [0, 0, 0]


def test_single_references_have_no_agreement() -> None:
    single = {image_id: captions[:1] for image_id, captions in REFERENCES.items()}
    scores = human_agreement(small_corpus(single), with_meteor=False, resampling=RESAMPLING)
    assert scores.keys() == {"num_images", "protocol"}
    assert scores["num_images"] == 0


@needs_java
def test_meteor_of_humans_and_the_model() -> None:
    meteor = human_agreement(small_corpus(), with_meteor=True, resampling=RESAMPLING)["METEOR"]
    assert 0 < meteor["human"][0] < meteor["model"][0]


def test_meteor_is_missing_in_other_languages() -> None:
    corpus = small_corpus()
    corpus = replace(corpus, tokenization=replace(corpus.tokenization, language="de"))
    scores = human_agreement(corpus, with_meteor=True, resampling=RESAMPLING)
    assert "METEOR" not in scores
    assert "METEOR is missing: METEOR is for English, and the language of the captions is de." in scores["protocol"]


def test_without_java_meteor_is_missing_and_the_protocol_has_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = human_agreement(small_corpus(), with_meteor=True, resampling=RESAMPLING)
    assert "METEOR" not in scores
    assert any(line.startswith("METEOR is missing") and "java" in line for line in scores["protocol"])
