"""Cross-validation without real images: folds, scores, whole runs, retrieval and the textbook decoder."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks.crossvalidation.__main__ import main, seed_groups
from benchmarks.crossvalidation.folds import MAX_VAL_IMAGES, Fold, ImageSet, assign_folds
from benchmarks.crossvalidation.systems import SYSTEMS, Captions, Experiment, System, caption_fold, write_params
from benchmarks.crossvalidation.table import (
    SCORES,
    USAGE_HEAD,
    Row,
    SystemScores,
    add_means,
    baseline_row,
    difference_lines,
    score,
    score_lines,
    usage_lines,
)
from benchmarks.retrieval import consensus, document_frequencies, nearest, retrieve
from benchmarks.soft_attention import SEARCH, Settings, SoftAttention, caption_loss
from pipeline.captions.records import Record
from pipeline.captions.tokens import TOKENS_FILE, read_tokens
from pipeline.captions.vocabulary import END, PAD, START, UNK
from pipeline.errors import UserError
from pipeline.features.encoder import EncodeParams
from pipeline.params import load
from pipeline.training.self_critical import RefineParams
from pipeline.training.trainer import TrainParams
from tests.factories import random_encoder


@given(
    image_ids=st.lists(st.integers(0, 10**6), min_size=2, max_size=400, unique=True),
    num_folds=st.integers(2, 6),
)
def test_every_image_is_tested_in_exactly_one_fold_and_trained_on_in_all_others(
    image_ids: list[int], num_folds: int
) -> None:
    num_folds = min(num_folds, len(image_ids))
    folds = assign_folds(image_ids, num_folds)
    assert len(folds) == num_folds
    assert sorted(image_id for fold in folds for image_id in fold.test) == sorted(image_ids)
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    for fold in folds:
        assert sorted([*fold.train_and_val, *fold.test]) == sorted(image_ids)
        assert len(fold.val) == min(MAX_VAL_IMAGES, len(fold.train_and_val) // 5)


def test_folds_do_not_depend_on_the_order_of_images() -> None:
    image_ids = list(range(50))
    assert assign_folds(image_ids) == assign_folds(image_ids[::-1])


def test_folds_need_images() -> None:
    with pytest.raises(UserError, match="--images 3: must be at least the number of folds, 5"):
        assign_folds([1, 2, 3])


CAPTIONS = {
    1: ["a dog runs on grass", "a brown dog runs over the grass", "a dog in a field"],
    2: ["a man rides a red bike", "a man on a bike", "someone rides a bike down a road"],
    3: ["two children play in water", "kids play in a pool", "two kids in the water"],
}
REFERENCES = {image_id: [caption.split() for caption in captions] for image_id, captions in CAPTIONS.items()}
GOOD = {1: "a dog runs over the grass", 2: "a man rides a bike", 3: "two kids play in the water"}


def scores_of(captions: Mapping[int, str]) -> SystemScores:
    return score({image_id: caption.split() for image_id, caption in captions.items()}, REFERENCES)


def test_the_tables_have_a_line_for_each_row_and_each_difference_to_a_baseline() -> None:
    good, constant = scores_of(GOOD), scores_of(dict.fromkeys(GOOD, "a man on a bike"))
    assert (good.num_distinct, constant.num_distinct, good.mean_length) == (3, 1, pytest.approx(17 / 3))
    scores = {
        Row("soft_attention", "1", "greedy"): constant,
        Row("top_down", "1", "greedy"): good,
        Row("retrieval", "", ""): constant,
    }
    assert [line.split(" | ")[0] for line in score_lines(scores)] == ["| soft_attention", "| top_down", "| retrieval"]
    lines = difference_lines(scores)
    assert [line.split(" | ")[:4] for line in lines] == [
        ["| soft_attention", "1", "greedy", "retrieval"],
        ["| top_down", "1", "greedy", "soft_attention 1"],
        ["| top_down", "1", "greedy", "retrieval"],
    ]
    assert lines[0].count("+0.000 (+0.000 to +0.000)") == len(SCORES)
    assert lines[1].split(" | ")[4] == lines[2].split(" | ")[4] != lines[0].split(" | ")[4]


def test_the_table_of_words_shows_what_captions_say_too_often() -> None:
    references = {image_id: [["a", "dog", "runs"], ["the", "dog", "is", "running"]] for image_id in range(20)}
    references[20] = [["a", "cat"]]
    right = {image_id: captions[0] for image_id, captions in references.items()}
    wrong = {image_id: ["a", "dog", "on", "a", "bench"] for image_id in range(8)}
    scores = score(right | wrong, references)
    assert scores.overused == ["bench 8 (0)"]
    expected = {"precision": 33 / 41, "bad_endings": 0, "num_overused_words": 1, "vocab_size": 6}
    assert {name: scores.usage[name] for name in expected} == pytest.approx(expected)
    row = Row("soft_attention", "1", "greedy")
    (line,) = usage_lines({row: scores})
    assert line.count("|") == USAGE_HEAD[0].count("|") == USAGE_HEAD[1].count("|")
    assert "| 0.805 |" in line
    other = score({image_id: ["a", "dog", "on"] for image_id in references}, references)
    assert other.usage["bad_endings"] == 1
    mean = add_means({row: scores, row._replace(seeds="2"): other})[row._replace(seeds="mean")]
    assert mean.usage["bad_endings"] == pytest.approx(0.5)


def test_means_and_ensembles_are_compared_with_the_mean_of_the_baseline() -> None:
    good, constant = scores_of(GOOD), scores_of(dict.fromkeys(GOOD, "a man on a bike"))
    rows = {
        Row(name, seeds, "beam 5"): good for name in ("soft_attention", "adaptive") for seeds in ("1", "2", "1 + 2")
    }
    scores = add_means({**rows, Row("soft_attention", "2", "beam 5"): constant})
    assert [row.seeds for row in scores] == ["1", "2", "mean", "1 + 2"] * 2
    mean = scores[Row("soft_attention", "mean", "beam 5")]
    assert mean.num_distinct == 2
    for metric in SCORES:
        np.testing.assert_allclose(2 * mean.tables[metric], good.tables[metric] + constant.tables[metric])
    baselines = [baseline_row(row, "soft_attention", list(scores)) for row in scores if row.system == "adaptive"]
    assert [row and row.seeds for row in baselines] == ["1", "2", "mean", "mean"]


def test_only_systems_of_gridcap_have_ensembles() -> None:
    assert seed_groups("top_down", [1, 2]) == [(1,), (2,), (1, 2)]
    assert seed_groups("textbook", [1, 2]) == [(1,), (2,)]
    assert seed_groups("retrieval", [1, 2]) == [()]
    assert seed_groups("top_down", [3]) == [(3,)]


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_has_valid_settings(name: str, tmp_path: Path) -> None:
    params = write_params(tmp_path, tmp_path, SYSTEMS[name])
    assert load(params, "encode", EncodeParams).weights.parent == tmp_path / "weights"
    assert load(params, "train", TrainParams).decoder.kind in (*name.partition("_refined")[:1], "soft_attention")
    assert (load(params, "refine", RefineParams).max_epochs > 0) == ("refined" in name)


def test_runs_at_the_same_time_read_their_own_settings(tmp_path: Path) -> None:
    def train_params(seed: int) -> TrainParams:
        params = write_params(tmp_path, tmp_path / "params", [*SYSTEMS["text"], f"train.seed={seed % 3}"])
        return load(params, "train", TrainParams)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(train_params, range(24)))
    assert [params.seed for params in results] == [seed % 3 for seed in range(24)]
    assert {params.max_epochs for params in results} == {18}
    assert len(list((tmp_path / "params").iterdir())) == 3


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
    captions = decoder.caption(regions, [str(token) for token in range(12)], SEARCH)
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
    return ImageSet(
        folder=folder,
        records={
            image_id: Record(image_id=image_id, file=f"{image_id}.jpg", split="train", captions=tuple(captions))
            for image_id, captions in CAPTIONS.items()
        },
        digests={image_id: f"{image_id:064x}" for image_id in CAPTIONS},
        references=REFERENCES,
    )


def test_an_interrupted_run_captions_only_the_missing_folds(tmp_path: Path) -> None:
    captioned: list[tuple[int, ...]] = []

    def caption(fold: Fold) -> Captions:
        captioned.append(fold.test)
        if len(captioned) == 2:
            raise KeyboardInterrupt
        return {"greedy": {image_id: GOOD[image_id].split() for image_id in fold.test}}

    images, folds = image_set(tmp_path), assign_folds(list(CAPTIONS), 3)
    system = System(key={"size": 1, "code": "a"}, caption=caption)

    def run(system: System, images: ImageSet = images, finished: bool = False) -> list[Captions | None]:
        return [caption_fold(system, images, fold, tmp_path, finished) for fold in folds]

    with pytest.raises(KeyboardInterrupt):
        run(system)
    assert [captions is None for captions in run(system, finished=True)] == [False, True, True]
    captions = run(system)
    assert captioned == [folds[0].test, folds[1].test, folds[1].test, folds[2].test]
    assert captions == run(system, finished=True)
    for fold, of_fold in zip(folds, captions, strict=True):
        assert of_fold == {"greedy": {image_id: GOOD[image_id].split() for image_id in fold.test}}
    for changed_system, changed_images in (
        (replace(system, key={"size": 2, "code": "a"}), images),
        (replace(system, key={"size": 1, "code": "b"}), images),
        (system, replace(images, digests=images.digests | {1: "0" * 64})),
    ):
        assert run(changed_system, changed_images, finished=True) == [None] * 3


def test_a_text_leaves_out_the_captions_of_the_other_folds_images(tmp_path: Path) -> None:
    lines = [f"{image_id}.jpg,{caption}" for image_id, captions in CAPTIONS.items() for caption in captions]
    (tmp_path / "text").mkdir()
    text = tmp_path / "text/flickr8k_captions.csv"
    text.write_text("\n".join(["image,caption", *lines, "new.jpg,a dog sleeps"]) + "\n")
    experiments = [
        Experiment(image_set(tmp_path), params, tmp_path / "work", torch.device("cpu"))
        for params in (write_params(tmp_path, tmp_path, SYSTEMS[name]) for name in ("text", "soft_attention"))
    ]
    fold = Fold(train=(1,), val=(2,), test=(3,))
    tokens = [read_tokens(experiment.tokens(fold) / TOKENS_FILE, "text") for experiment in experiments]
    assert [len(split.image_id) for split in tokens] == [len(CAPTIONS[1]) + 1, 0]


def write_real_folder(folder: Path) -> None:
    """Write noise images with captions, and random weights."""
    rng = np.random.default_rng(6)
    (folder / "flickr/images").mkdir(parents=True)
    names = [f"{number}.jpg" for number in range(15)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / "flickr/images" / name)
    lines = [f"{name},{caption}" for index, name in enumerate(names) for caption in CAPTIONS[1 + index % 3]]
    (folder / "flickr/captions.txt").write_text("\n".join(["image,caption", *lines]) + "\n")
    (folder / "flickr/splits.json").write_text(json.dumps({"train": names[4:], "val": names[:2], "test": names[2:4]}))
    (folder / "weights").mkdir()
    weights = random_encoder("resnet18", "layer3", num_images=2).state_dict()
    torch.save(weights, folder / "weights/resnet18-imagenet-to-layer3.pth")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_systems_share_features_and_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_real_folder(tmp_path / "real")
    work = tmp_path / "work"
    small = ["encode.image_size=32", "encode.views=[whole]", "train.decoder.embedding_size=8", "train.max_epochs=1"]
    small += ["train.decoder.hidden_size=8", "train.decoder.attention_size=8", "train.compile=false"]
    arguments = ["--real", str(tmp_path / "real"), "--work", str(work), "--folds", "2", "--device", "cpu"]
    arguments += ["--systems", "refined", "soft_attention", "textbook", "retrieval", "--set", *small, "--seeds"]
    main([*arguments, "1"])
    main([*arguments, "1", "2"])
    table = capsys.readouterr().out.split("bootstrap samples over images")[-1]
    rows = [line.split(" | ")[:3] for line in table.partition("minus")[0].splitlines() if " (" in line]
    seeds = ["1", "2", "mean", "1 + 2"]
    for name, expected in (("refined", seeds), ("soft_attention", seeds), ("textbook", seeds[:3]), ("retrieval", [""])):
        searches = [""] if name == "retrieval" else ["greedy", "beam 5"]
        actual = {(seed, search) for system, seed, search in rows if system == f"| {name}"}
        assert actual == {(seed, search) for seed in expected for search in searches}
    for folder, number in (("train", 2), ("refine", 2), ("features", 1), ("tokens", 1), ("captions", 9)):
        assert sum(path.is_dir() for path in (work / folder).iterdir()) == number, folder
    main(["--finished", *arguments, "1", "2"])
    assert capsys.readouterr().out.split("bootstrap samples over images")[-1] == table


def test_a_missing_image_folder_skips_the_benchmark(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["--real", str(tmp_path / "absent")])
    output = capsys.readouterr().out
    assert output.startswith("skipped")
    assert str(tmp_path / "absent") in output
