from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.captions.vocabulary import (
    END,
    START,
    UNK,
    Vocabulary,
    read_vocabulary,
    write_vocabulary,
)
from pipeline.errors import UserError

CAPTIONS = [["b", "a", "dog"], ["dog", "a"], ["dog", "<unk>", "rare"], ["b"]]


def test_words_are_sorted_by_count_then_alphabetically_after_the_specials() -> None:
    vocabulary = Vocabulary.build(CAPTIONS, min_count=2)
    assert vocabulary.words == ("<pad>", "<start>", "<end>", "<unk>", "dog", "a", "b")


def test_encode_maps_rare_words_to_unk() -> None:
    vocabulary = Vocabulary.build(CAPTIONS, min_count=2)
    assert vocabulary.encode(["dog", "rare"]) == [4, UNK]


def test_decode_stops_at_the_first_end() -> None:
    vocabulary = Vocabulary.build(CAPTIONS, min_count=2)
    assert vocabulary.decode([START, 4, 5, END, 6]) == ["dog", "a"]


@given(st.lists(st.lists(st.text(min_size=1), max_size=5), max_size=5))
def test_encode_and_decode_round_trip_with_min_count_1(captions: list[list[str]]) -> None:
    vocabulary = Vocabulary.build(captions, min_count=1)
    specials = {"<pad>", "<start>", "<end>"}
    for words in captions:
        if not specials & set(words):
            assert vocabulary.decode(vocabulary.encode(words)) == words


@pytest.mark.parametrize(
    "words", [("<pad>", "<start>", "<end>", "dog"), ("<pad>", "<start>", "<end>", "<unk>", "a", "a")]
)
def test_invalid_word_lists_are_rejected(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="vocabulary must"):
        Vocabulary(words)


def test_file_round_trip(tmp_path: Path) -> None:
    vocabulary = Vocabulary.build([["ä", "dog"]], min_count=1)
    write_vocabulary(tmp_path / "vocabulary.json", vocabulary)
    assert read_vocabulary(tmp_path / "vocabulary.json") == vocabulary


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"dog"', '"cat"', "digest"),
        ('"<unk>",', "", "must start with"),
        ('"words"', '"tokens"', "words: Field required"),
        ('"schema_version": 1', '"schema_version": 2', "gridcap.vocabulary version 2"),
        ('"dog"', '""', "words[4]: String should have at least 1 character"),
        ('"dog"', '"\\ud800"', "Invalid JSON"),
        ("{", "", "Invalid JSON"),
    ],
)
def test_altered_file_is_an_error(tmp_path: Path, before: str, after: str, message: str) -> None:
    path = tmp_path / "vocabulary.json"
    write_vocabulary(path, Vocabulary.build([["dog"]], min_count=1))
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(UserError) as error:
        read_vocabulary(path, "Restore it.")
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert str(error.value).endswith("Restore it.")


def test_missing_file_is_an_error_that_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocabulary\.json: no such file\. .*tokenize"):
        read_vocabulary(tmp_path / "vocabulary.json")
