from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.captions.records import Record, Split
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.captions.tokens import (
    SCHEMA,
    TokenizedDataset,
    group_references,
    read_tokenization,
    read_tokens,
    require_vocabulary,
    tokenize,
    write_tokens,
)
from pipeline.captions.vocabulary import END, PAD, START, Vocabulary
from pipeline.errors import UserError
from pipeline.hdf5 import content_digest

PARAMS = TokenizeParams(language="en", lowercase=True, punctuation="drop", min_count=1, max_length=4)


def record(image_id: int, split: Split, *captions: str) -> Record:
    return Record(image_id=image_id, file=f"{image_id}.jpg", split=split, captions=captions)


RECORDS = [
    record(3, "train", "A dog runs .", "Two dogs run over the wet grass"),
    record(5, "train", "A cat", "!?"),
    record(7, "val", "A zebra"),
    record(8, "test", "The dog"),
]


def words_of(dataset: TokenizedDataset, split: Split) -> list[str]:
    """Return each caption's ids as words, joined by spaces and padded."""
    words, captions = dataset.vocabulary.words, dataset.splits[split]
    return [" ".join(words[token_id] for token_id in row) for row in captions.padded(range(len(captions.image_id)))]


def test_captions_become_truncated_ids() -> None:
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    train = dataset.splits["train"]
    assert words_of(dataset, "train") == [
        "<start> a dog runs <end>",
        "<start> two dogs run over",
        "<start> a cat <end> <pad>",
    ]
    assert len(train.ids) == 14
    assert train.offset.tolist() == [0, 5, 10, 14]
    assert train.length.tolist() == [5, 5, 4]
    assert train.image_id.tolist() == [3, 3, 5]
    assert train.captions == ["a dog runs", "two dogs run over the wet grass", "a cat"]


@pytest.mark.parametrize("max_length", [1, 4, 12])
def test_ids_equal_those_of_each_caption_alone(max_length: int) -> None:
    rng = np.random.default_rng(0)
    captions = [rng.choice(list("abcdefgh"), size=size).tolist() for size in rng.integers(1, 10, size=60)]
    params = TokenizeParams(language="en", lowercase=True, punctuation="drop", min_count=35, max_length=max_length)
    dataset = tokenize([record(1, "train", *map(" ".join, captions))], params, Path("records.jsonl"))
    assert 4 < len(dataset.vocabulary) < 12
    for row, words in enumerate(captions):
        expected = [START, *dataset.vocabulary.encode(words[:max_length]), *[END][: len(words) <= max_length]]
        assert dataset.splits["train"].padded([row]).tolist() == [expected]


def test_padding_has_the_shape_of_the_rows() -> None:
    train = tokenize(RECORDS, PARAMS, Path("records.jsonl")).splits["train"]
    padded = train.padded([[2, 0], [0, 1]])
    assert padded.shape == (2, 2, 5)
    assert padded[0, 0].tolist() == [*train.padded([2])[0], PAD]
    assert train.padded(np.arange(0)).shape == (0, 0)


def test_vocabulary_is_built_from_train_captions_alone() -> None:
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    words = dataset.vocabulary.words
    assert "zebra" not in words
    assert words_of(dataset, "val") == ["<start> a <unk> <end>"]
    assert dataset.splits["val"].captions == ["a zebra"]


def test_metrics_count_truncated_unknown_and_empty_captions() -> None:
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    assert dataset.metrics["vocab_size"] == len(dataset.vocabulary) == 4 + 11
    assert dataset.metrics["num_captions_without_words"] == 1
    assert dataset.metrics["train_num_captions"] == 3
    assert dataset.metrics["train_num_truncated"] == 1
    assert dataset.metrics["train_words_per_caption"] == 4
    assert dataset.metrics["val_unk_rate"] == 0.5


def test_image_whose_captions_have_no_word_is_an_error() -> None:
    with pytest.raises(UserError, match=r"records\.jsonl: image 4 \(4\.jpg\).*'\.\.\.', '-'"):
        tokenize([*RECORDS, record(4, "train", "...", "-")], PARAMS, Path("records.jsonl"))


def test_empty_vocabulary_is_an_error() -> None:
    rare = TokenizeParams(language="en", lowercase=True, punctuation="drop", min_count=99, max_length=4)
    with pytest.raises(UserError, match=r"records\.jsonl: .*tokenize\.min_count = 99"):
        tokenize(RECORDS, rare, Path("records.jsonl"))


UNSEGMENTED = ["一只棕色的狗在草地上奔跑", "狗在跑", "两个男人在长椅上聊天", "一个孩子爬上黄色的滑梯"]


@pytest.mark.parametrize("language", ["en", "xx", "de"])
def test_captions_that_a_language_does_not_split_are_an_error(language: str) -> None:
    with pytest.raises(UserError, match=rf"^records\.jsonl: 3 of 4 captions .* tokenize\.language={language} .* zh"):
        tokenize([record(1, "train", *UNSEGMENTED)], replace(PARAMS, language=language), Path("records.jsonl"))


def test_chinese_is_split_into_characters() -> None:
    params = replace(PARAMS, language="zh")
    dataset = tokenize([record(1, "train", *UNSEGMENTED)], params, Path("records.jsonl"))
    assert dataset.vocabulary.language == "zh"
    assert dataset.splits["train"].captions[1] == "狗 在 跑"
    assert words_of(dataset, "train")[1] == "<start> 狗 在 跑 <end>"


@pytest.mark.parametrize("labels", [["dog", "cat"], ["狗", "自行车"], ["สุนัข", "จักรยาน"]])
def test_one_word_labels_are_captions(labels: list[str]) -> None:
    dataset = tokenize([record(1, "train", *labels)], PARAMS, Path("records.jsonl"))
    assert dataset.splits["train"].captions == labels


def test_file_round_trip_with_descriptions(tmp_path: Path) -> None:
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    path = tmp_path / "tokens.h5"
    write_tokens(path, dataset, PARAMS, "0123")
    read = read_tokens(path, "train")
    np.testing.assert_array_equal(read.ids, dataset.splits["train"].ids)
    np.testing.assert_array_equal(read.offset, dataset.splits["train"].offset)
    np.testing.assert_array_equal(read.image_id, dataset.splits["train"].image_id)
    assert read.text == dataset.splits["train"].text
    with h5py.File(path) as file:
        assert file.attrs["fingerprint"] == "0123"
        assert file.attrs["vocabulary_digest"] == dataset.vocabulary.digest
        assert file.attrs["vocab_size"] == len(dataset.vocabulary)
        assert set(file["test"]) == {"ids", "offset", "image_id", "text"}
        assert all("description" in dataset.attrs for dataset in file["test"].values())


def test_captions_of_skipped_images_are_left_out(tmp_path: Path) -> None:
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    write_tokens(tmp_path / "tokens.h5", dataset, PARAMS, "0123")
    read = read_tokens(tmp_path / "tokens.h5", "train", skipped_ids={3, 99})
    assert read.image_id.tolist() == [5]
    assert read.captions == ["a cat"]
    np.testing.assert_array_equal(read.padded([0]), dataset.splits["train"].padded([2]))
    np.testing.assert_array_equal(read.length, dataset.splits["train"].length[2:])


def test_references_group_captions_by_image() -> None:
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    assert group_references(dataset.splits["train"]) == {
        3: [["a", "dog", "runs"], ["two", "dogs", "run", "over", "the", "wet", "grass"]],
        5: [["a", "cat"]],
    }


def test_tokenization_is_recorded_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens.h5"
    write_tokens(path, tokenize(RECORDS, PARAMS, Path("records.jsonl")), PARAMS, "0123")
    tokenization = read_tokenization(path)
    assert tokenization.tokenizer == "spacy"
    assert tokenization.version == version("spacy")
    assert tokenization.lowercase is True
    assert tokenization.punctuation == "drop"
    assert tokenization.language == "en"


def test_tokens_of_another_vocabulary_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "tokens.h5"
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    write_tokens(path, dataset, PARAMS, "0123")
    require_vocabulary(path, dataset.vocabulary)
    other = Vocabulary.build([["zebra"]], min_count=1)
    with pytest.raises(UserError) as error:
        require_vocabulary(path, other)
    assert str(error.value).startswith(f"{path}: ")
    assert dataset.vocabulary.digest in str(error.value)
    assert other.digest in str(error.value)


def test_file_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tokens(tmp_path / name, tokenize(RECORDS, PARAMS, Path("records.jsonl")), PARAMS, "0")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_missing_damaged_or_foreign_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "tokens.h5"
    with pytest.raises(UserError, match=r"tokens\.h5: no such file"):
        read_tokens(path, "val")
    path.write_bytes(b"not HDF5")
    with pytest.raises(UserError, match=r"tokens\.h5: cannot be read"):
        read_tokens(path, "val")
    with h5py.File(path, "w") as file:
        file.attrs["schema"] = "other"
    with pytest.raises(UserError, match=rf"tokens\.h5: .*other.*{SCHEMA.name}"):
        read_tokens(path, "val")


def alter_value(file: h5py.File) -> None:
    file["train/ids"][1] = 5


def alter_text(file: h5py.File) -> None:
    file["val/text"][0] = ord("b")


def alter_attribute(file: h5py.File) -> None:
    file.attrs["punctuation"] = "keep"


def remove_split(file: h5py.File) -> None:
    del file["test"]


def remove_digest(file: h5py.File) -> None:
    del file.attrs["sha256"]


@pytest.mark.parametrize("alter", [alter_value, alter_text, alter_attribute, remove_split, remove_digest])
@pytest.mark.parametrize("read", [partial(read_tokens, group="train"), read_tokenization])
def test_altered_file_is_an_error(
    tmp_path: Path, alter: Callable[[h5py.File], None], read: Callable[[Path], object]
) -> None:
    path = tmp_path / "tokens.h5"
    write_tokens(path, tokenize(RECORDS, PARAMS, Path("records.jsonl")), PARAMS, "0123")
    read(path)
    with h5py.File(path, "r+") as file:
        alter(file)
    with pytest.raises(UserError, match=r"tokens\.h5: .*sha256.* Run `dvc repro -f -s tokenize`\.$"):
        read(path)


@pytest.mark.parametrize(
    ("name", "index", "value", "fault"),
    [
        ("ids", 1, 15, "ids are 1 to 15, but the vocabulary has 15 words"),
        ("ids", 1, -1, "ids are -1 to "),
        ("ids", 5, 4, "caption 1 does not begin with <start>"),
        ("offset", 1, 15, "offset does not divide the 14 ids among 3 captions"),
        ("offset", 1, -1, "offset does not divide"),
        ("offset", 0, 1, "offset does not divide"),
        ("offset", 3, 13, "offset does not divide"),
        ("image_id", 0, 5, "the captions of an image are not next to each other"),
        ("text", 0, ord("\n"), "text does not have 3 lines with words"),
        ("text", -1, ord("a"), "text does not have 3 lines with words"),
        ("text", 0, 0xFF, "cannot be read as gridcap.tokens"),
    ],
)
def test_values_out_of_bounds_are_errors(tmp_path: Path, name: str, index: int, value: int, fault: str) -> None:
    path = tmp_path / "tokens.h5"
    write_tokens(path, tokenize(RECORDS, PARAMS, Path("records.jsonl")), PARAMS, "0123")
    with h5py.File(path, "r+") as file:
        file["train"][name][index] = value
        file.attrs["sha256"] = content_digest(file)
    with pytest.raises(UserError) as error:
        read_tokens(path, "train")
    assert str(error.value).startswith(f"{path}:")
    assert fault in str(error.value)
    assert str(error.value).endswith("Run `dvc repro -f -s tokenize`.")


def test_dataset_of_another_type_or_shape_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "tokens.h5"
    write_tokens(path, tokenize(RECORDS, PARAMS, Path("records.jsonl")), PARAMS, "0123")
    with h5py.File(path, "r+") as file:
        ids = file["train/ids"][:].astype(np.float64)
        del file["train/ids"]
        file["train/ids"] = ids
        file.attrs["sha256"] = content_digest(file)
    with pytest.raises(UserError, match=r"dataset ids is float64 \[14\], expected int32 \[any\]"):
        read_tokens(path, "train")


def test_tokens_of_a_vocabulary_of_another_size_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "tokens.h5"
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    write_tokens(path, dataset, PARAMS, "0123")
    with h5py.File(path, "r+") as file:
        file.attrs["vocab_size"] = 10**6
        file.attrs["sha256"] = content_digest(file)
    with pytest.raises(UserError, match=r"of 1000000 words, but vocabulary\.json has"):
        require_vocabulary(path, dataset.vocabulary)
