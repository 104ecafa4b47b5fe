import subprocess
import sys
from typing import Literal

import pytest

from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer
from tests.paths import ROOT


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


@pytest.mark.slow
def test_spacy_is_imported_without_torch_which_can_be_imported_later() -> None:
    code = """
import sys
from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer
make_tokenizer(TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_length=9))
assert not [name for name in sys.modules if name.partition(".")[0] == "torch"]
import torch
torch.zeros(1)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
