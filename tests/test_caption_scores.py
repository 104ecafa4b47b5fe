"""Scores of a corpus with intervals and subsets, human agreement and diversity, on a few captions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.agreement import agreement
from pipeline.metrics.bleu import bleu, bleu_counts
from pipeline.metrics.bootstrap import Resampling
from pipeline.metrics.caption_scores import CORPUS_SCORES, image_rows, measure, summary
from pipeline.metrics.cider import cider
from pipeline.metrics.corpus import Corpus
from pipeline.metrics.diversity import diversity
from pipeline.metrics.rouge import rouge_l
from pipeline.metrics.tokenizers import corpora

RESAMPLING = Resampling(bootstrap_samples=300, seed=5)

REFERENCES = {
    4: ["a dog runs on grass", "a brown dog runs over the grass", "a dog in a field"],
    9: ["a man rides a red bike", "a man on a bike"],
    2: ["two children play in water", "kids play in a pool", "two kids in the water"],
    7: ["a plate of food"],
}
CAPTIONS = {2: "two kids play in the water", 9: "a man rides a bike", 4: "a dog on the grass", 7: "a plate"}


def corpus() -> Corpus:
    return corpora("spacy", REFERENCES, [CAPTIONS])[0]


def test_a_corpus_is_in_the_order_of_image_ids() -> None:
    found = corpus()
    assert found.image_ids == (2, 4, 7, 9)
    assert found.hypotheses[1] == ["a", "dog", "on", "the", "grass"]
    assert found.references[3] == [["a", "man", "rides", "a", "red", "bike"], ["a", "man", "on", "a", "bike"]]
    assert found.protocol == (f"tokens: {SPACY}", "references: 1 to 3 an image")


def test_systems_share_their_references() -> None:
    first, second = corpora("spacy", REFERENCES, [CAPTIONS, dict.fromkeys(CAPTIONS, "A Dog!")])
    assert first == corpus()
    assert second.references == first.references
    assert second.hypotheses == (["a", "dog"],) * 4


def test_scores_are_those_of_their_modules_and_say_how_they_were_made() -> None:
    found = corpus()
    measured = measure(found, with_meteor=False, with_spice=False)
    scores = summary(measured, {}, RESAMPLING)
    hypotheses, references = found.hypotheses, found.references
    bleus = bleu(bleu_counts(hypotheses, references).sum(axis=0))
    wanted = {f"BLEU-{order}": value for order, value in enumerate(bleus, start=1)}
    wanted["ROUGE-L"] = rouge_l(hypotheses, references).mean()
    wanted["CIDEr-D"] = cider(hypotheses, references).cider_d.mean()
    assert {name: scores[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    assert scores["images"] == 4
    assert scores["unavailable"] == {"METEOR": ["not asked for"], "SPICE": ["not asked for"]}
    for name in wanted:
        low, high = scores["intervals"][name]
        assert low <= scores[name] <= high
        lines = scores["protocol"][name]
        for key in ("metric", "library", "average", "smoothing", "tokens", "references"):
            assert any(line.startswith(f"{key}: ") for line in lines), (name, key)
    assert any(line.startswith("brevity: closest") for line in scores["protocol"]["BLEU-4"])
    assert "300 resamples, seed 5" in scores["protocol"]["intervals"][0]
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_intervals_are_the_same_for_the_same_seed() -> None:
    measured = measure(corpus(), with_meteor=False, with_spice=False)
    first, again = (summary(measured, {}, RESAMPLING) for _ in range(2))
    other = summary(measured, {}, Resampling(bootstrap_samples=300, seed=6))
    assert first == again
    assert first["intervals"] != other["intervals"]
    assert first["CIDEr-D"] == other["CIDEr-D"]


def test_subsets_are_scored_with_the_document_frequencies_of_all_images() -> None:
    found = corpus()
    measured = measure(found, with_meteor=False, with_spice=False)
    scores = summary(measured, {"odd": [7, 9], "even": [2, 4]}, RESAMPLING)
    parts = scores["subsets"]
    assert parts["odd"]["images"] == parts["even"]["images"] == 2
    of_images = cider(found.hypotheses, found.references).cider_d
    assert parts["odd"]["CIDEr-D"] == pytest.approx(of_images[2:].mean(), abs=1e-6)
    counts = bleu_counts(found.hypotheses, found.references)
    assert parts["even"]["BLEU-4"] == pytest.approx(bleu(counts[:2].sum(axis=0))[3], abs=1e-6)
    assert set(scores["intervals"]["subsets"]["odd"]) == set(parts["odd"]) - {"images"}


def test_each_image_has_its_own_scores() -> None:
    measured = measure(corpus(), with_meteor=False, with_spice=False)
    rows = image_rows(measured)
    assert [row["image_id"] for row in rows] == [2, 4, 7, 9]
    assert set(rows[0]) == {"image_id", "ROUGE-L", "CIDEr-D", "CIDEr"}
    assert np.mean([row["ROUGE-L"] for row in rows]) == pytest.approx(measured.score("ROUGE-L"), abs=1e-6)


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_meteor_of_people_and_of_subsets() -> None:
    measured = measure(corpus(), with_meteor=True, with_spice=False)
    scores = summary(measured, {"odd": [7, 9]}, RESAMPLING)
    assert 0.2 < scores["METEOR"] < 1
    assert scores["subsets"]["odd"]["METEOR"] != scores["METEOR"]
    assert measured.images["METEOR"].shape == (4,)
    people = agreement(corpus(), with_meteor=True, resampling=RESAMPLING)["METEOR"]
    assert 0 < people["human"][0] < people["model"][0]


def test_people_lack_meteor_without_java_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    people = agreement(corpus(), with_meteor=True, resampling=RESAMPLING)
    assert "METEOR" not in people
    assert any(line.startswith("METEOR is missing: there is no java on the PATH") for line in people["protocol"])


def test_people_are_scored_each_reference_against_the_others() -> None:
    found = agreement(corpus(), with_meteor=False, resampling=RESAMPLING)
    assert found["images"] == 3  # the plate of food has one reference
    # By hand: the corpora that are left when the first, the second or the third reference is taken out.
    words = {one: [caption.split() for caption in REFERENCES[one]] for one in (2, 4, 9)}
    words[9].append(words[9][0])  # has two, so its first is the one after its second
    counts, ciders = [], []
    for left_out in range(3):
        persons = [captions[left_out] for captions in words.values()]
        others = [[*words[2][:left_out], *words[2][left_out + 1 :]], [*words[4][:left_out], *words[4][left_out + 1 :]]]
        others.append([words[9][(left_out + 1) % 2]])
        counts.append(bleu_counts(persons, others))
        ciders.append(cider(persons, others).cider_d)
    bleus = bleu(np.concatenate(counts).sum(axis=0))
    assert [found[f"BLEU-{order}"]["human"][0] for order in range(1, 5)] == pytest.approx(bleus, abs=1e-6)
    assert found["CIDEr-D"]["human"][0] == pytest.approx(np.concatenate(ciders).mean(), abs=1e-6)
    value, low, high = found["CIDEr-D"]["model - human"]
    assert value == pytest.approx(found["CIDEr-D"]["model"][0] - found["CIDEr-D"]["human"][0], abs=2e-6)
    assert low <= value <= high


def test_people_who_always_agree_score_highest() -> None:
    same = {one: [text] * 3 for one, text in CAPTIONS.items()}
    found = agreement(corpora("spacy", same, [CAPTIONS])[0], with_meteor=False, resampling=RESAMPLING)
    assert found["images"] == 4
    assert found["ROUGE-L"]["human"] == found["ROUGE-L"]["model"] == [1, 1, 1]
    assert found["BLEU-1"]["model - human"] == [0, 0, 0]


def test_people_cannot_agree_where_each_image_has_one_reference() -> None:
    single = {one: captions[:1] for one, captions in REFERENCES.items()}
    found = agreement(corpora("spacy", single, [CAPTIONS])[0], with_meteor=False, resampling=RESAMPLING)
    assert found.keys() == {"images", "protocol"}
    assert found["images"] == 0


@pytest.mark.parametrize(
    ("captions", "wanted"),
    [
        (
            ["a dog runs", "a dog runs", "a red cube"],
            {"captions": 3, "distinct": 2, "share_distinct": 2 / 3, "words_a_caption": 3, "shortest": 3, "longest": 3}
            | {"vocabulary": 5, "share_of_vocabulary": 3 / 4, "distinct_bigrams": 4 / 6, "seen_in_training": 2 / 3},
        ),
        (
            ["", "x"],
            {"captions": 2, "distinct": 2, "share_distinct": 1, "words_a_caption": 0.5, "shortest": 0, "longest": 1}
            | {"vocabulary": 1, "share_of_vocabulary": 0, "distinct_bigrams": 0, "seen_in_training": 0},
        ),
    ],
)
def test_diversity(captions: list[str], wanted: dict[str, float]) -> None:
    trained_on = {("a", "dog", "runs"), ("a", "dog", "runs", "home")}
    found = diversity([caption.split() for caption in captions], {"a", "dog", "red", "home"}, trained_on)
    assert found == pytest.approx(wanted, abs=1e-3)


words = st.lists(st.sampled_from("abcd"), max_size=6)


@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=4), st.randoms())
@settings(max_examples=50, deadline=None)
def test_scores_of_all_images_are_made_of_sums_in_any_order(pairs, random) -> None:
    def scores(order):
        chosen = [pairs[place] for place in order]
        found = measure(
            Corpus(
                image_ids=tuple(range(len(chosen))),
                hypotheses=tuple(pair[0] for pair in chosen),
                references=tuple(pair[1] for pair in chosen),
                tokens="letters",
            ),
            with_meteor=False,
            with_spice=False,
        )
        return {name: found.score(name) for name in found.tables}

    order = list(range(len(pairs)))
    straight = scores(order)
    random.shuffle(order)
    assert scores(order) == pytest.approx(straight)
    assert set(straight) < set(CORPUS_SCORES)
