import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.captions.records import Split
from pipeline.captions.sources.parsed_file import ParsedImage, SourceCaption
from pipeline.captions.sources.splits import SeededSplits, SplitAssignment, Splits, assign_splits
from pipeline.errors import UserError
from pipeline.params import check
from tests.dataset_files import LISTS

SEEDED = SeededSplits(by="seed", seed=7, val=0.25, test=0.25)


def image(image_id: int, split: Split | None = None) -> ParsedImage:
    caption = SourceCaption("A dog .", f"captions.txt:{image_id + 2}")
    return ParsedImage(
        image_id=image_id, file=f"{image_id}.jpg", location=caption.location, split=split, captions=(caption,)
    )


def images(ids: Sequence[int]) -> list[ParsedImage]:
    return [image(image_id) for image_id in ids]


def write_lists(root: Path, train: str, val: str = "1.jpg\n", test: str = "2.jpg\n") -> None:
    for name, content in (("train", train), ("val", val), ("test", test)):
        (root / f"{name}.txt").write_text(content)


def assign_by_files(parsed: list[ParsedImage], params: dict[str, Any], root: Path) -> SplitAssignment:
    return assign_splits(parsed, check(params, "dataset.splits", Splits, "params.yaml"), root)


@given(st.permutations(range(40)), st.integers(min_value=0, max_value=9))
def test_random_splits_have_exact_counts_and_ignore_the_order(order: list[int], seed: int) -> None:
    params = SeededSplits(by="seed", seed=seed, val=0.1, test=0.26)
    split = assign_splits(images(order), params, Path()).split_by_file
    assert split == assign_splits(images(range(40)), params, Path()).split_by_file
    assert [list(split.values()).count(name) for name in ("train", "val", "test")] == [26, 4, 10]


def test_random_splits_depend_on_the_seed() -> None:
    other_seed = SeededSplits(by="seed", seed=8, val=0.25, test=0.25)
    first, second = (assign_splits(images(range(40)), params, Path()).split_by_file for params in (SEEDED, other_seed))
    assert sum(first[file] != second[file] for file in first) > 10


def test_one_more_image_changes_at_most_two_random_splits() -> None:
    before = assign_splits(images(range(40)), SEEDED, Path()).split_by_file
    after = assign_splits(images(range(41)), SEEDED, Path()).split_by_file
    assert sum(after[file] != split for file, split in before.items()) <= 2


def test_random_splits_leave_the_splits_of_caption_files_alone() -> None:
    params = SeededSplits(by="seed", seed=1, val=0.5, test=0.5)
    split = assign_splits([image(0, "train"), image(1), image(2)], params, Path()).split_by_file
    assert split["0.jpg"] == "train"
    assert {split["1.jpg"], split["2.jpg"]} == {"val", "test"}


def test_images_that_no_list_names_are_in_no_split(tmp_path: Path) -> None:
    write_lists(tmp_path, "0.jpg\n\n")
    assert assign_by_files(images(range(4)), LISTS, tmp_path).split_by_file == {
        "0.jpg": "train",
        "1.jpg": "val",
        "2.jpg": "test",
    }


def test_json_file_gives_the_splits(tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text(
        json.dumps({"train": ["0.jpg", "3.jpg"], "val": ["1.jpg"], "test": ["2.jpg"]})
    )
    split = assign_by_files(images(range(4)), {"by": "json", "file": "splits.json"}, tmp_path).split_by_file
    assert split == {"0.jpg": "train", "3.jpg": "train", "1.jpg": "val", "2.jpg": "test"}


def test_listed_images_without_captions_are_reported(tmp_path: Path) -> None:
    write_lists(tmp_path, "0.jpg\n9.jpg\n")
    assignment = assign_by_files(images(range(4)), LISTS, tmp_path)
    assert assignment.unknown_images == [f"9.jpg ({tmp_path / 'train.txt'}:2)"]
    assert "9.jpg" not in assignment.split_by_file


def test_image_without_a_split_is_an_error() -> None:
    with pytest.raises(UserError, match=r"captions\.txt:3: .*3 in total"):
        assign_splits([image(0, "train"), *images(range(1, 4))], None, Path())


def test_image_in_two_lists_is_an_error(tmp_path: Path) -> None:
    write_lists(tmp_path, "0.jpg\n1.jpg\n")
    with pytest.raises(UserError) as error:
        assign_by_files(images(range(4)), LISTS, tmp_path)
    message = str(error.value)
    assert "1.jpg" in message
    assert f"{tmp_path / 'train.txt'}:2" in message
    assert f"{tmp_path / 'val.txt'}:1" in message


def test_list_that_contradicts_the_caption_file_is_an_error(tmp_path: Path) -> None:
    write_lists(tmp_path, "0.jpg\n")
    with pytest.raises(UserError, match=r"val\.txt:1: 1\.jpg is in val, but also in train"):
        assign_by_files([image(0, "train"), image(1, "train"), image(2)], LISTS, tmp_path)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (LISTS | {"val": "dev.txt"}, "dev.txt: no such file"),
        ({"by": "json", "file": "val.txt"}, "val.txt: Invalid JSON"),
    ],
)
def test_missing_or_malformed_split_file_is_an_error(tmp_path: Path, params: dict[str, Any], message: str) -> None:
    write_lists(tmp_path, "0.jpg\n")
    with pytest.raises(UserError) as error:
        assign_by_files(images(range(4)), params, tmp_path)
    assert str(tmp_path / message) in str(error.value)


def named_images(*files: str) -> list[ParsedImage]:
    return [replace(image(index), file=file) for index, file in enumerate(files)]


def test_entries_without_suffix_are_matched_by_stem(tmp_path: Path) -> None:
    write_lists(tmp_path, "1000000001\n", "sub/b\n", "c.v1\n")
    parsed = named_images("images/1000000001.jpg", "sub/b.png", "images/c.v1.jpg", "sub/d.png")
    assignment = assign_by_files(parsed, LISTS, tmp_path)
    assert assignment.split_by_file == {
        "images/1000000001.jpg": "train",
        "sub/b.png": "val",
        "images/c.v1.jpg": "test",
    }
    assert assignment.unknown_images == []


def test_json_entries_may_be_numbers(tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text(json.dumps({"train": [0], "val": [1], "test": ["2"]}))
    split = assign_by_files(images(range(3)), {"by": "json", "file": "splits.json"}, tmp_path).split_by_file
    assert split == {"0.jpg": "train", "1.jpg": "val", "2.jpg": "test"}


def test_entry_that_matches_several_images_is_an_error(tmp_path: Path) -> None:
    write_lists(tmp_path, "b.jpg\na\n")
    with pytest.raises(UserError) as error:
        assign_by_files(named_images("x/a.jpg", "y/a.png", "b.jpg"), LISTS, tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'train.txt'}:2: a ")
    assert "x/a.jpg" in message
    assert "y/a.png" in message


def test_entries_are_matched_in_any_unicode_normalization(tmp_path: Path) -> None:
    write_lists(tmp_path, "caf\u00e9.jpg\n")
    split = assign_by_files(named_images("cafe\u0301.jpg", "1.jpg", "2.jpg"), LISTS, tmp_path).split_by_file
    assert split["cafe\u0301.jpg"] == "train"


@pytest.mark.parametrize(
    ("params", "fault"),
    [
        ({}, "dataset.splits.by is missing"),
        ({"by": "random"}, "dataset.splits.by must be one of 'lists', 'json', 'seed', got \"random\""),
        ({"by": "seed", "seed": 1, "val": "x", "test": 0.5}, 'dataset.splits.val must be a valid number, got "x"'),
        ({"by": "seed", "seed": "x", "val": 0.5, "test": 0.5}, 'dataset.splits.seed must be a valid integer, got "x"'),
        ({"by": "seed", "val": 0.5, "test": 0.5}, "dataset.splits.seed is missing"),
        ({"by": "seed", "seed": 1, "val": 0.9, "test": 0.9}, "dataset.splits: val + test must be <= 1"),
        ([1], "dataset.splits must be a mapping, got [1]"),
    ],
)
def test_invalid_params_are_named_by_their_key(params: object, fault: str) -> None:
    with pytest.raises(UserError) as caught:
        check(params, "dataset.splits", Splits, "params.yaml")
    assert fault in str(caught.value)
