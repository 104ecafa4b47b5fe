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


def test_words_stand_by_count_then_alphabet_after_the_specials() -> None:
    vocabulary = Vocabulary.build(CAPTIONS, min_count=2)
    assert vocabulary.words == ("<pad>", "<start>", "<end>", "<unk>", "dog", "a", "b")


def test_rare_words_become_unknown_and_decoding_stops_at_the_end() -> None:
    vocabulary = Vocabulary.build(CAPTIONS, min_count=2)
    assert vocabulary.encode(["dog", "rare"]) == [4, UNK]
    assert vocabulary.decode([START, 4, 5, END, 6]) == ["dog", "a"]


@given(st.lists(st.lists(st.text(min_size=1), max_size=5), max_size=5))
def test_the_train_captions_come_back_when_every_word_counts(captions: list[list[str]]) -> None:
    vocabulary = Vocabulary.build(captions, min_count=1)
    specials = {"<pad>", "<start>", "<end>"}
    for words in captions:
        if not specials & set(words):
            assert vocabulary.decode(vocabulary.encode(words)) == words


def test_a_vocabulary_comes_back_from_its_file(tmp_path: Path) -> None:
    vocabulary = Vocabulary.build([["ä", "dog"]], min_count=1)
    write_vocabulary(tmp_path / "vocabulary.json", vocabulary)
    assert read_vocabulary(tmp_path / "vocabulary.json") == vocabulary


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"dog"', '"cat"', "do not match its digest"),
        ('"<unk>",', "", "is no vocabulary"),
        ('"schema_version": 1', '"schema_version": 2', "has schema gridcap.vocabulary 2"),
        ("{", "", "is no vocabulary"),
    ],
)
def test_an_altered_file_is_refused(tmp_path: Path, before: str, after: str, message: str) -> None:
    path = tmp_path / "vocabulary.json"
    write_vocabulary(path, Vocabulary.build([["dog"]], min_count=1))
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(UserError, match=message):
        read_vocabulary(path)
