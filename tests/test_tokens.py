from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.captions.records import Record, Split
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.captions.tokens import (
    SCHEMA,
    group_references,
    read_tokenization,
    read_tokens,
    require_vocabulary,
    tokenize,
    write_tokens,
)
from pipeline.captions.vocabulary import Vocabulary
from pipeline.errors import UserError

PARAMS = TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_length=4)


def record(image_id: int, split: Split, *captions: str) -> Record:
    return Record(image_id=image_id, file=f"{image_id}.jpg", split=split, captions=captions)


RECORDS = [
    record(3, "train", "A dog runs .", "Two dogs run over the wet grass"),
    record(5, "train", "A cat", "!?"),
    record(7, "val", "A zebra"),
    record(8, "test", "The dog"),
]


def test_captions_become_padded_and_truncated_ids() -> None:
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    words = dataset.vocabulary.words
    train = dataset.splits["train"]
    assert [" ".join(words[token_id] for token_id in row) for row in train.tokens] == [
        "<start> a dog runs <end> <pad>",
        "<start> two dogs run over <pad>",
        "<start> a cat <end> <pad> <pad>",
    ]
    assert train.length.tolist() == [5, 5, 4]
    assert train.image_id.tolist() == [3, 3, 5]
    assert train.captions[1] == "two dogs run over the wet grass"


def test_vocabulary_is_built_from_train_captions_alone() -> None:
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    words = dataset.vocabulary.words
    assert "zebra" not in words
    val = dataset.splits["val"]
    assert [words[token_id] for token_id in val.tokens[0]][:4] == ["<start>", "a", "<unk>", "<end>"]
    assert val.captions == ("a zebra",)


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
    rare = TokenizeParams(lowercase=True, punctuation="drop", min_count=99, max_length=4)
    with pytest.raises(UserError, match=r"records\.jsonl: .*tokenize\.min_count = 99"):
        tokenize(RECORDS, rare, Path("records.jsonl"))


def test_file_round_trip_with_descriptions(tmp_path: Path) -> None:
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    path = tmp_path / "tokens.h5"
    write_tokens(path, dataset, PARAMS, "0123")
    read = read_tokens(path, "train")
    np.testing.assert_array_equal(read.tokens, dataset.splits["train"].tokens)
    np.testing.assert_array_equal(read.length, dataset.splits["train"].length)
    np.testing.assert_array_equal(read.image_id, dataset.splits["train"].image_id)
    assert read.captions == dataset.splits["train"].captions
    with h5py.File(path) as file:
        assert file.attrs["fingerprint"] == "0123"
        assert file.attrs["vocabulary_digest"] == dataset.vocabulary.digest
        assert set(file["test"]) == {"tokens", "length", "image_id", "caption"}
        assert all("description" in dataset.attrs for dataset in file["test"].values())


def test_captions_of_skipped_images_are_left_out(tmp_path: Path) -> None:
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    write_tokens(tmp_path / "tokens.h5", dataset, PARAMS, "0123")
    read = read_tokens(tmp_path / "tokens.h5", "train", skipped_ids={3, 99})
    assert read.image_id.tolist() == [5]
    assert read.captions == ("a cat",)
    np.testing.assert_array_equal(read.tokens, dataset.splits["train"].tokens[2:])
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
