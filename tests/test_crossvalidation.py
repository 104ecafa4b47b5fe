"""The comparison out of folds: its folds, intervals, retrieval and textbook decoder, without photographs."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.crossvalidation import (
    HELD_OUT,
    SCORES,
    Fold,
    Photographs,
    Scored,
    System,
    assign_splits,
    main,
    of_retrieval,
    out_of_fold,
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
from pipeline.features.store import FeatureStore, write_index, write_shard
from tests.factories import small_spec


@given(
    image_ids=st.lists(st.integers(0, 10**6), min_size=2, max_size=400, unique=True),
    folds=st.integers(2, 6),
    seed=st.integers(0, 9),
)
def test_every_image_is_in_exactly_one_fold_and_seen_in_none_that_captions_it(
    image_ids: list[int], folds: int, seed: int
) -> None:
    folds = min(folds, len(image_ids))
    divided = assign_splits(image_ids, folds, seed)
    assert len(divided) == folds
    assert sorted(image_id for fold in divided for image_id in fold.test) == sorted(image_ids)
    sizes = [len(fold.test) for fold in divided]
    assert max(sizes) - min(sizes) <= 1
    for fold in divided:
        assert sorted([*fold.others, *fold.test]) == sorted(image_ids)
        assert len(fold.val) == min(HELD_OUT, len(fold.others) // 5)


def test_folds_are_the_same_for_the_same_seed_in_whatever_order_images_come() -> None:
    image_ids = list(range(50))
    assert assign_splits(image_ids, 5, 3) == assign_splits(image_ids[::-1], 5, 3)
    assert assign_splits(image_ids, 5, 3) != assign_splits(image_ids, 5, 4)


@pytest.mark.parametrize("folds", [0, 1, 4])
def test_folds_need_images_on_both_sides(folds: int) -> None:
    with pytest.raises(UserError, match="--folds must be from 2 to the number of images, 3, got"):
        assign_splits([1, 2, 3], folds, 0)


CAPTIONS = {
    1: ["a dog runs on grass", "a brown dog runs over the grass", "a dog in a field"],
    2: ["a man rides a red bike", "a man on a bike", "someone rides a bike down a road"],
    3: ["two children play in water", "kids play in a pool", "two kids in the water"],
}
REFERENCES = {image_id: [caption.split() for caption in captions] for image_id, captions in CAPTIONS.items()}
GOOD = {1: "a dog runs over the grass", 2: "a man rides a bike", 3: "two kids play in the water"}


def scored(captions: Mapping[int, str]) -> Scored:
    return score({image_id: caption.split() for image_id, caption in captions.items()}, REFERENCES)


def test_targets_are_judged_from_the_captions_of_all_images() -> None:
    good, same = scored(GOOD), scored(dict.fromkeys(GOOD, "a man on a bike"))
    assert (good.images, good.distinct, same.distinct) == (3, 3, 1)
    assert good.words == pytest.approx(17 / 3)
    assert set(SCORES) <= set(good.tables)
    for own, other, met in ((good, same, True), (same, good, False)):
        found = targets({"ours": own, "textbook": other, "retrieval": other})
        assert len(found) == 5
        # Resamples of three images tell nothing, so the targets of intervals are left out.
        certain = [target for target in found if "interval" not in target and "noise" not in target]
        assert [found[target] for target in certain] == [met] * 3
    assert targets({"textbook": good}) == {}


def test_the_table_has_a_line_a_system_and_one_a_difference() -> None:
    good = scored(GOOD)
    lines = table({"ours": good, "textbook": good})
    assert [line[:16].strip() for line in lines] == ["", "ours", "textbook", "ours - textbook"]
    assert lines[-1].count("+0.000 [+0.000, +0.000]") == len(SCORES)


def test_the_consensus_caption_is_the_one_most_like_the_others() -> None:
    candidates = [["a", "red", "car"], ["dog", "runs", "home"], ["the", "dog", "runs"], ["the", "dog"]]
    frequencies = document_frequencies([candidates, [["a", "plane"]], [["a", "red", "house"], ["a", "barn"]]])
    assert (frequencies["a",], frequencies["a", "red"], frequencies["dog", "runs"]) == (3, 2, 1)
    assert consensus(candidates, frequencies, 3) == 2
    assert consensus(candidates[::-1], frequencies, 3) == 1
    assert consensus([["plane"]], frequencies, 3) == 0


def test_neighbors_are_found_by_direction_from_the_training_mean() -> None:
    train = np.array([[10, 11], [10, 9], [12, 10], [8, 10]], dtype=np.float32)
    near = nearest(np.array([[10, 10.1], [30, 9]], dtype=np.float32), train, 2)
    assert near[:, 0].tolist() == [0, 2]
    assert nearest(np.array([[10, 10]], dtype=np.float32), train, 4).shape == (1, 4)


def test_retrieval_says_what_was_said_of_the_neighbors() -> None:
    rng = np.random.default_rng(4)
    kinds = np.repeat([[5.0, 0.0], [-5.0, 0.0]], 20, axis=0).astype(np.float32)
    captions = [REFERENCES[1]] * 20 + [REFERENCES[2]] * 20
    found = retrieve(
        np.array([[4, 0], [-4, 0]], dtype=np.float32),
        kinds + rng.normal(0, 0.1, kinds.shape).astype(np.float32),
        captions,
    )
    assert found[0] in REFERENCES[1]
    assert found[1] in REFERENCES[2]


def test_the_textbook_decoder_steps_in_search_as_it_does_in_training() -> None:
    torch.manual_seed(0)
    decoder = SoftAttention(Settings(size=8), 6, 12).eval()
    regions = torch.rand(3, 4, 6)
    captions = decoder.caption(regions)
    for row, words in enumerate(captions):
        assert not {PAD, START, END, UNK} & set(words)
        ids = torch.tensor([[START, *words, END]])
        logits, attention = decoder(regions[row : row + 1], ids[:, :-1])
        assert attention.sum(dim=-1).detach().numpy() == pytest.approx(1.0)
        assert logits.shape == (1, len(words) + 1, 12)


def test_the_textbook_objective_sums_over_regions_and_averages_over_captions() -> None:
    logits = torch.zeros(2, 3, 5)
    attention = torch.full((2, 3, 4), 0.25)
    targets = torch.tensor([[4, 4, END], [4, END, PAD]])
    wanted = np.log(5) + (4 * 0.25**2 + 4 * 0.5**2) / 2
    assert caption_loss(logits, attention, targets, 1.0).item() == pytest.approx(wanted)


def photographs(folder: Path) -> Photographs:
    spec = small_spec()
    contents = {image_id: f"{image_id:064}" for image_id in CAPTIONS}
    keys = [(content, "whole") for content in contents.values()]
    grids = np.random.default_rng(5).random((len(keys), *spec.grid_shape)).astype(np.float16)
    shard = write_shard(folder, spec, list(CAPTIONS), keys, grids)
    write_index(folder, spec, ["whole"], [shard], contents)
    return Photographs(
        records={
            image_id: Record(image_id=image_id, file=f"{image_id}.jpg", split="train", captions=tuple(captions))
            for image_id, captions in CAPTIONS.items()
        },
        words=REFERENCES,
        tokenize=TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_length=20),
        store=FeatureStore(folder),
        features=folder,
    )


def test_a_run_after_a_kill_captions_only_what_is_missing(tmp_path: Path) -> None:
    asked: list[tuple[int, ...]] = []

    def caption(fold: Fold, _: Path) -> dict[int, list[str]]:
        asked.append(fold.test)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {image_id: GOOD[image_id].split() for image_id in fold.test}

    given_to_all, folds = photographs(tmp_path / "features"), assign_splits(list(CAPTIONS), 3, 0)
    system = System(settings={"size": 1}, code="a", caption=caption)
    with pytest.raises(KeyboardInterrupt):
        out_of_fold("ours", system, given_to_all, folds, tmp_path)
    found = out_of_fold("ours", system, given_to_all, folds, tmp_path)
    assert {image_id: " ".join(words) for image_id, words in found.items()} == GOOD
    assert asked == [folds[0].test, folds[1].test, folds[1].test, folds[2].test]
    for other in (replace(system, settings={"size": 2}), replace(system, code="b")):
        asked.clear()
        out_of_fold("ours", other, given_to_all, folds[:1], tmp_path)
        assert asked == [folds[0].test]


def test_retrieval_captions_a_fold_from_the_others(tmp_path: Path) -> None:
    given_to_all = photographs(tmp_path / "features")
    for fold in assign_splits(list(CAPTIONS), 3, 0):
        found = of_retrieval(given_to_all).caption(fold, tmp_path)
        assert list(found) == list(fold.test)
        assert all(words in [own for other in fold.others for own in REFERENCES[other]] for words in found.values())


def test_an_absent_folder_of_photographs_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["--real", str(tmp_path / "absent")])
    assert "skipped: there is no folder" in capsys.readouterr().out
