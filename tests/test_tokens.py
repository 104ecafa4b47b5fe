from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.captions.records import Record, Split
from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer
from pipeline.captions.tokens import read_tokens, references, tokenize, write_tokens
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


@pytest.mark.parametrize(
    ("lowercase", "punctuation", "words"),
    [
        (True, "drop", ["a", "t", "shirt", "does", "n't", "cost", "5.50"]),
        (False, "drop", ["A", "T", "shirt", "does", "n't", "cost", "5.50"]),
        (True, "keep", ["a", "t", "-", "shirt", '"', "does", "n't", '"', "cost", "$", "5.50", "!"]),
    ],
)
def test_a_caption_is_split_by_english_rules(lowercase: bool, punctuation: str, words: list[str]) -> None:
    params = TokenizeParams(lowercase=lowercase, punctuation=punctuation, min_count=1, max_length=9)  # type: ignore[arg-type]
    assert make_tokenizer(params)('A T-shirt  "doesn\'t" cost $5.50 !') == words


def test_ids_are_framed_padded_and_cut_and_words_come_from_train_alone() -> None:
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    words = dataset.vocabulary.words
    assert "zebra" not in words
    train = dataset.splits["train"]
    shown = [" ".join(words[number] for number in row) for row in train.tokens]
    assert shown == [
        "<start> a dog runs <end> <pad>",
        "<start> two dogs run over <pad>",
        "<start> a cat <end> <pad> <pad>",
    ]
    assert train.length.tolist() == [5, 5, 4]
    assert train.image_id.tolist() == [3, 3, 5]
    assert train.captions[1] == "two dogs run over the wet grass"
    val = dataset.splits["val"]
    assert [words[number] for number in val.tokens[0]][:4] == ["<start>", "a", "<unk>", "<end>"]
    assert val.captions == ("a zebra",)


def test_what_was_cut_or_dropped_is_counted() -> None:
    counts = tokenize(RECORDS, PARAMS, Path("records.jsonl")).counts
    assert counts["captions_without_words"] == 1
    assert counts["train_captions_cut"] == 1
    assert counts["val_share_unknown"] == 0.5


def test_an_image_without_a_word_is_an_error() -> None:
    with pytest.raises(UserError, match=r"records\.jsonl: no caption of image 4 \(4\.jpg\) has a word"):
        tokenize([*RECORDS, record(4, "train", "...", "-")], PARAMS, Path("records.jsonl"))


def test_a_vocabulary_without_words_is_an_error() -> None:
    rare = TokenizeParams(lowercase=True, punctuation="drop", min_count=99, max_length=4)
    with pytest.raises(UserError, match=r"tokenize\.min_count = 99"):
        tokenize(RECORDS, rare, Path("records.jsonl"))


def test_tokens_come_back_from_their_file_and_the_file_describes_itself(tmp_path: Path) -> None:
    dataset = tokenize(RECORDS, PARAMS, Path("records.jsonl"))
    path = tmp_path / "tokens.h5"
    write_tokens(path, dataset, PARAMS, "0123")
    read = read_tokens(path, "train")
    np.testing.assert_array_equal(read.tokens, dataset.splits["train"].tokens)
    np.testing.assert_array_equal(read.length, dataset.splits["train"].length)
    assert read.captions == dataset.splits["train"].captions
    assert references(read) == {
        3: [["a", "dog", "runs"], ["two", "dogs", "run", "over", "the", "wet", "grass"]],
        5: [["a", "cat"]],
    }
    with h5py.File(path) as file:
        assert file.attrs["fingerprint"] == "0123"
        assert file.attrs["vocabulary_digest"] == dataset.vocabulary.digest
        assert all("description" in file["test"][name].attrs for name in file["test"])


def test_the_file_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in "ab":
        write_tokens(tmp_path / name, tokenize(RECORDS, PARAMS, Path("r")), PARAMS, "0")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_damaged_or_foreign_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokens.h5"
    with pytest.raises(UserError, match="no such file"):
        read_tokens(path, "val")
    path.write_bytes(b"not HDF5")
    with pytest.raises(UserError, match=r"tokens\.h5: cannot be read"):
        read_tokens(path, "val")
    with h5py.File(path, "w") as file:
        file.attrs["schema"] = "other"
    with pytest.raises(UserError, match="has schema other None"):
        read_tokens(path, "val")
