"""Languages of captions: codes, texts from words, and captions that were not split into words."""

import subprocess
import sys

import pytest

from pipeline.captions.languages import (
    SEGMENTERS,
    Language,
    is_unsegmented,
    join_words,
    language_codes,
    require_segmented,
)
from pipeline.errors import UserError
from pipeline.params import check
from tests.paths import ROOT


def test_the_codes_are_those_of_spacy() -> None:
    codes = language_codes()
    assert {"de", "en", "fr", "hi", "xx", "zh", *SEGMENTERS} <= set(codes)
    assert all(code.isalpha() for code in codes)


def test_codes_are_listed_without_importing_spacy() -> None:
    code = """
import sys
from pipeline.captions.languages import language_codes
print(len(language_codes()), "spacy" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout.split() == [str(len(language_codes())), "False"]


@pytest.mark.parametrize("language", ["EN", "klingon", ""])
def test_an_unknown_code_is_one_sentence_with_all_codes(language: str) -> None:
    with pytest.raises(UserError) as error:
        check(language, "tokenize.language", Language, "params.yaml")
    message = str(error.value)
    assert message.startswith("params.yaml: tokenize.language")
    assert repr(language) in message
    assert ", ".join(language_codes()) in message
    assert "\n" not in message


@pytest.mark.parametrize("language", ["en", "zh", "th", "vi", "xx"])
def test_no_words_are_an_empty_text(language: str) -> None:
    assert join_words([], language) == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("一只棕色的狗在草地上奔跑", True),
        ("茶色の犬が芝生の上を走っている", True),
        ("สุนัขสีน้ำตาลกำลังวิ่งบนสนามหญ้า", True),
        ("ཁྱི་ནག་པོ་ཞིག་རྒྱུག་གི་འདུག", True),
        ("一 只 棕 色 的 狗", False),
        ("茶色 の 犬 が スケボー に 乗る", False),
        ("นักท่องเที่ยว ขี่ มอเตอร์ไซค์", False),  # words of 13 and 12 characters
        ("สุนัข", False),
        ("自行车", False),
        ("갈색 개가 잔디밭을 달린다", False),
        ("एक कुत्ता घास पर दौड़ रहा है", False),
        ("dog", False),
        ("donaudampfschifffahrtsgesellschaftskapitän", False),
    ],
)
def test_a_phrase_without_spaces_is_not_a_word(line: str, expected: bool) -> None:
    assert is_unsegmented(line) is expected


@pytest.mark.parametrize(("num_unsegmented", "language"), [(2, "en"), (4, "zh"), (0, "xx")])
def test_up_to_half_of_the_captions_may_be_unsegmented(num_unsegmented: int, language: str) -> None:
    require_segmented(num_unsegmented, 4, language, "records.jsonl", "tokenize.language")


def test_more_are_an_error_that_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"^records\.jsonl: 3 of 4 captions .* tokenize\.language=en .* zh"):
        require_segmented(3, 4, "en", "records.jsonl", "tokenize.language")
