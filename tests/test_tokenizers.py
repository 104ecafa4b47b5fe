"""Corpora from untokenized captions."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.metrics.ptb import PTB
from pipeline.metrics.tokenizers import SPACY, build_corpora
from tests.java_programs import needs_java

pytestmark = pytest.mark.slow  # spaCy is slow to import

REFERENCES = {4: ["A dog, running.", "A brown dog!"], 9: ["A man on a bike."], 2: ["Kids (two) play."]}
CAPTIONS = {9: "a man", 4: "A Dog."}


def test_a_corpus_is_ordered_by_image_id_and_ignores_other_images() -> None:
    (corpus,) = build_corpora("spacy", "en", REFERENCES, [CAPTIONS])
    assert corpus.image_ids == (4, 9)
    assert corpus.hypotheses == (["a", "dog"], ["a", "man"])
    assert corpus.references == ([["a", "dog", "running"], ["a", "brown", "dog"]], [["a", "man", "on", "a", "bike"]])
    assert corpus.tokenization == SPACY
    assert corpus.signature["tok"].startswith("spacy-3.")


def test_systems_share_their_references() -> None:
    first, second = build_corpora("spacy", "en", REFERENCES, [CAPTIONS, dict.fromkeys(CAPTIONS, "A Cat!")])
    assert first == build_corpora("spacy", "en", REFERENCES, [CAPTIONS])[0]
    assert second.references == first.references
    assert second.hypotheses == (["a", "cat"],) * 2


@needs_java
def test_a_corpus_of_the_ptb_tokenizer() -> None:
    (corpus,) = build_corpora("ptb", "en", REFERENCES, [{2: "can't (go)"}])
    assert corpus.hypotheses == (["ca", "n't", "-lrb-", "go", "-rrb-"],)
    assert corpus.references == ([["kids", "-lrb-", "two", "-rrb-", "play"]],)
    assert corpus.tokenization == PTB
    assert corpus.signature == {"refs": "1", "tok": "ptb-3.4.1", "lang": "en", "case": "lower", "punct": "drop"}


def test_without_java_the_error_names_both_tokenizers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"ptb.*java.*spacy"):
        build_corpora("ptb", "en", REFERENCES, [CAPTIONS])
