from typing import Literal

import pytest

from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer


@pytest.mark.parametrize(
    ("lowercase", "punctuation", "words"),
    [
        (True, "drop", ["a", "t", "shirt", "does", "n't", "cost", "5.50"]),
        (False, "drop", ["A", "T", "shirt", "does", "n't", "cost", "5.50"]),
        (True, "keep", ["a", "t", "-", "shirt", '"', "does", "n't", '"', "cost", "$", "5.50", "!"]),
    ],
)
def test_captions_are_split_by_spacys_english_rules(
    lowercase: bool, punctuation: Literal["drop", "keep"], words: list[str]
) -> None:
    params = TokenizeParams(lowercase=lowercase, punctuation=punctuation, min_count=1, max_length=9)
    assert make_tokenizer(params)('A T-shirt  "doesn\'t" cost $5.50 !') == words


@pytest.mark.parametrize("punctuation", ["drop", "keep"])
def test_whitespace_is_never_a_token(punctuation: Literal["drop", "keep"]) -> None:
    params = TokenizeParams(lowercase=True, punctuation=punctuation, min_count=1, max_length=9)
    assert make_tokenizer(params)(" A  dog \n runs ") == ["a", "dog", "runs"]
