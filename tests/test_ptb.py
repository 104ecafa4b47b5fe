from pathlib import Path

import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from pipeline.metrics.java import UnavailableError
from pipeline.metrics.ptb import tokenize_ptb
from tests.caption_corpora import coco_captions
from tests.java_programs import install_as_java, needs_java


@needs_java
def test_words_equal_those_of_coco_caption() -> None:
    captions = [
        "A man's dog -- a BIG one -- can't run (far).",
        "",
        "``Stop!'' says the sign; it reads: 3/4 mile...",
        "two\nlines",
        ".",
        "a café <unk> 1 1/2",
    ]
    assert tokenize_ptb(captions) == [
        # Brackets stay, since coco-caption drops `-LRB-` only after lowercasing.
        ["a", "man", "'s", "dog", "a", "big", "one", "ca", "n't", "run", "-lrb-", "far", "-rrb-"],
        [],
        ["stop", "says", "the", "sign", "it", "reads", "3/4", "mile"],
        ["two", "lines"],
        [],
        ["a", "café", "<unk>", "1", "1/2"],
    ]


def test_no_captions_need_no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tokenize_ptb([]) == []
    with pytest.raises(UnavailableError, match="java"):
        tokenize_ptb(["a"])


@needs_java
def test_a_caption_with_an_unusual_line_end_stays_one_caption() -> None:
    ends = ["\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"]
    assert tokenize_ptb([f"a{end}b" for end in ends]) == [["a", "b"]] * len(ends)


@needs_java
def test_words_of_real_captions_equal_those_of_pycocoevalcap() -> None:
    captions = coco_captions(400)
    expected = PTBTokenizer().tokenize({index: [{"caption": caption}] for index, caption in enumerate(captions)})
    assert tokenize_ptb(captions) == [expected[index][0].split() for index in range(len(captions))]


def test_a_wrong_number_of_lines_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_as_java(monkeypatch, tmp_path, f"cat > {tmp_path}/input; echo a")
    with pytest.raises(UnavailableError, match="1 lines for 2 captions"):
        tokenize_ptb(["a", "b"])
