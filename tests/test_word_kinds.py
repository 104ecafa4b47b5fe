from pathlib import Path

import pytest
import spacy

from pipeline.metrics.java import UnavailableError
from pipeline.metrics.word_kinds import word_kinds


@pytest.fixture
def tagger(tmp_path: Path) -> Path:
    """Return a spaCy pipeline in which "a" is a determiner, and "fly" a noun after "a" and otherwise a verb."""
    pipeline = spacy.blank("en")
    rules = pipeline.add_pipe("attribute_ruler")
    rules.add([[{"ORTH": "fly"}]], {"POS": "VERB"})  # type: ignore[attr-defined]
    rules.add([[{"ORTH": "a"}]], {"POS": "DET"})  # type: ignore[attr-defined]
    rules.add([[{"ORTH": "a"}, {"ORTH": "fly"}]], {"POS": "NOUN"}, index=1)  # type: ignore[attr-defined]
    pipeline.to_disk(tmp_path / "tagger")
    return tmp_path / "tagger"


def test_the_kind_is_the_most_frequent_part_of_speech(tagger: Path) -> None:
    captions = [text.split() for text in ("birds fly", "kites fly", "a fly", "a bird")]
    assert word_kinds({"fly", "a", "zebra"}, captions, tagger) == {"fly": "verb", "a": "det"}
    assert word_kinds({"fly"}, [["a", "fly"]], tagger) == {"fly": "noun"}


def test_the_tokens_of_captions_are_kept(tagger: Path) -> None:
    assert word_kinds({"fly"}, [["don't", "fly"]], tagger) == {"fly": "verb"}


def test_a_missing_tagger_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"no_tagger is not installed\. Install it with `python -m spacy down"):
        word_kinds({"fly"}, [["fly"]], "no_tagger")
