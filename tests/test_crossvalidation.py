"""Cross-validation without real images: folds, scores and targets, retrieval and the textbook decoder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.crossvalidation import (
    MAX_VAL_IMAGES,
    SCORES,
    Fold,
    ImageSet,
    System,
    SystemScores,
    assign_folds,
    main,
    out_of_fold,
    retrieval_system,
    score,
    table,
    targets,
)
from benchmarks.retrieval import consensus, document_frequencies, nearest, retrieve
from benchmarks.soft_attention import Settings, SoftAttention, caption_loss
from pipeline.captions.records import Record
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.captions.vocabulary import END, PAD, START, UNK
from pipeline.errors import UserError
from tests.factories import small_spec
from tests.feature_stores import write_store


@given(
    image_ids=st.lists(st.integers(0, 10**6), min_size=2, max_size=400, unique=True),
    num_folds=st.integers(2, 6),
    seed=st.integers(0, 9),
)
def test_every_image_is_tested_in_exactly_one_fold_and_trained_on_in_all_others(
    image_ids: list[int], num_folds: int, seed: int
) -> None:
    num_folds = min(num_folds, len(image_ids))
    folds = assign_folds(image_ids, num_folds, seed)
    assert len(folds) == num_folds
    assert sorted(image_id for fold in folds for image_id in fold.test) == sorted(image_ids)
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    for fold in folds:
        assert sorted([*fold.train_and_val, *fold.test]) == sorted(image_ids)
        assert len(fold.val) == min(MAX_VAL_IMAGES, len(fold.train_and_val) // 5)


def test_folds_depend_on_the_seed_and_not_on_the_order_of_images() -> None:
    image_ids = list(range(50))
    assert assign_folds(image_ids, 5, 3) == assign_folds(image_ids[::-1], 5, 3)
    assert assign_folds(image_ids, 5, 3) != assign_folds(image_ids, 5, 4)


@pytest.mark.parametrize("num_folds", [0, 1, 4])
def test_folds_need_images_to_train_and_to_test(num_folds: int) -> None:
    with pytest.raises(UserError) as caught:
        assign_folds([1, 2, 3], num_folds, 0)
    assert f"--folds {num_folds}" in str(caught.value)
    assert "2 to the number of images, 3" in str(caught.value)


CAPTIONS = {
    1: ["a dog runs on grass", "a brown dog runs over the grass", "a dog in a field"],
    2: ["a man rides a red bike", "a man on a bike", "someone rides a bike down a road"],
    3: ["two children play in water", "kids play in a pool", "two kids in the water"],
}
REFERENCES = {image_id: [caption.split() for caption in captions] for image_id, captions in CAPTIONS.items()}
GOOD = {1: "a dog runs over the grass", 2: "a man rides a bike", 3: "two kids play in the water"}


def scores_of(captions: Mapping[int, str]) -> SystemScores:
    return score({image_id: caption.split() for image_id, caption in captions.items()}, REFERENCES)


def test_targets_compare_gridcap_with_the_other_systems() -> None:
    good, constant = scores_of(GOOD), scores_of(dict.fromkeys(GOOD, "a man on a bike"))
    assert (good.num_images, good.num_distinct, constant.num_distinct) == (3, 3, 1)
    assert good.mean_length == pytest.approx(17 / 3)
    assert set(SCORES) <= set(good.tables)
    for gridcap, other, expected in ((good, constant, True), (constant, good, False)):
        results = targets({"gridcap": gridcap, "textbook": other, "retrieval": other})
        assert len(results) == 5
        # Intervals from three images are meaningless, so their targets are left out.
        values = [result for target, result in results.items() if "interval" not in target and "BLEU-4" not in target]
        assert values == [expected] * 3
    assert targets({"textbook": good}) == {}


def test_the_table_has_a_line_for_each_system_and_each_difference() -> None:
    good = scores_of(GOOD)
    lines = table({"gridcap": good, "textbook": good})
    assert [line[:19].strip() for line in lines] == ["", "gridcap", "textbook", "gridcap - textbook"]
    assert lines[-1].count("+0.000 [+0.000, +0.000]") == len(SCORES)


def test_the_consensus_caption_is_most_similar_to_the_other_candidates() -> None:
    candidates = [["a", "red", "car"], ["dog", "runs", "home"], ["the", "dog", "runs"], ["the", "dog"]]
    frequencies = document_frequencies([candidates, [["a", "plane"]], [["a", "red", "house"], ["a", "barn"]]])
    assert (frequencies["a",], frequencies["a", "red"], frequencies["dog", "runs"]) == (3, 2, 1)
    assert consensus(candidates, frequencies, 3) == 2
    assert consensus(candidates[::-1], frequencies, 3) == 1
    assert consensus([["plane"]], frequencies, 3) == 0


def test_neighbors_are_nearest_by_cosine_after_centering() -> None:
    train = np.array([[10, 11], [10, 9], [12, 10], [8, 10]], dtype=np.float32)
    neighbors = nearest(np.array([[10, 10.1], [30, 9]], dtype=np.float32), train, 2)
    assert neighbors[:, 0].tolist() == [0, 2]
    assert nearest(np.array([[10, 10]], dtype=np.float32), train, 4).shape == (1, 4)


def test_retrieval_returns_a_caption_of_the_nearest_images() -> None:
    rng = np.random.default_rng(4)
    centers = np.repeat([[5.0, 0.0], [-5.0, 0.0]], 20, axis=0).astype(np.float32)
    captions = [REFERENCES[1]] * 20 + [REFERENCES[2]] * 20
    retrieved = retrieve(
        np.array([[4, 0], [-4, 0]], dtype=np.float32),
        centers + rng.normal(0, 0.1, centers.shape).astype(np.float32),
        captions,
    )
    assert retrieved[0] in REFERENCES[1]
    assert retrieved[1] in REFERENCES[2]


def test_the_textbook_decoder_steps_in_search_as_in_training() -> None:
    torch.manual_seed(0)
    decoder = SoftAttention(Settings(size=8), 6, 12).eval()
    regions = torch.rand(3, 4, 6)
    captions = decoder.caption(regions, [str(token) for token in range(12)])
    for row, words in enumerate(captions):
        tokens = [int(word) for word in words]
        assert not {PAD, START, END, UNK} & set(tokens)
        ids = torch.tensor([[START, *tokens, END]])
        logits, attention = decoder(regions[row : row + 1], ids[:, :-1])
        assert attention.sum(dim=-1).detach().numpy() == pytest.approx(1.0)
        assert logits.shape == (1, len(words) + 1, 12)


def test_the_textbook_loss_sums_over_regions_and_averages_over_captions() -> None:
    logits = torch.zeros(2, 3, 5)
    attention = torch.full((2, 3, 4), 0.25)
    targets = torch.tensor([[4, 4, END], [4, END, PAD]])
    expected = np.log(5) + (4 * 0.25**2 + 4 * 0.5**2) / 2
    assert caption_loss(logits, attention, targets, 1.0).item() == pytest.approx(expected)


def image_set(folder: Path) -> ImageSet:
    spec = small_spec()
    grids = np.random.default_rng(5).random((len(CAPTIONS), *spec.grid_shape)).astype(np.float16)
    return ImageSet(
        records={
            image_id: Record(image_id=image_id, file=f"{image_id}.jpg", split="train", captions=tuple(captions))
            for image_id, captions in CAPTIONS.items()
        },
        references=REFERENCES,
        tokenize=TokenizeParams(language="en", lowercase=True, punctuation="drop", min_count=1, max_length=20),
        store=write_store(folder, spec, list(CAPTIONS), grids),
        features=folder,
    )


def test_an_interrupted_run_captions_only_the_missing_folds(tmp_path: Path) -> None:
    captioned: list[tuple[int, ...]] = []

    def caption(fold: Fold, _: Path) -> dict[int, list[str]]:
        captioned.append(fold.test)
        if len(captioned) == 2:
            raise KeyboardInterrupt
        return {image_id: GOOD[image_id].split() for image_id in fold.test}

    images, folds = image_set(tmp_path / "features"), assign_folds(list(CAPTIONS), 3, 0)
    system = System(settings={"size": 1}, code="a", caption=caption)
    with pytest.raises(KeyboardInterrupt):
        out_of_fold("gridcap", system, images, folds, tmp_path)
    captions = out_of_fold("gridcap", system, images, folds, tmp_path)
    assert {image_id: " ".join(words) for image_id, words in captions.items()} == GOOD
    assert captioned == [folds[0].test, folds[1].test, folds[1].test, folds[2].test]
    for changed in (replace(system, settings={"size": 2}), replace(system, code="b")):
        captioned.clear()
        out_of_fold("gridcap", changed, images, folds[:1], tmp_path)
        assert captioned == [folds[0].test]


def test_retrieval_captions_a_fold_from_the_other_folds(tmp_path: Path) -> None:
    images = image_set(tmp_path / "features")
    for fold in assign_folds(list(CAPTIONS), 3, 0):
        captions = retrieval_system(images).caption(fold, tmp_path)
        assert list(captions) == list(fold.test)
        candidates = [words for image_id in fold.train_and_val for words in REFERENCES[image_id]]
        assert all(words in candidates for words in captions.values())


def test_a_missing_image_folder_skips_the_benchmark(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["--real", str(tmp_path / "absent")])
    output = capsys.readouterr().out
    assert output.startswith("skipped")
    assert str(tmp_path / "absent") in output
