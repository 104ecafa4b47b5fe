import subprocess
import sys
from typing import Literal

import pytest

from pipeline.captions.languages import SEGMENTERS, language_codes
from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer
from pipeline.errors import UserError
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
    params = TokenizeParams(language="en", lowercase=lowercase, punctuation=punctuation, min_count=1, max_length=9)
    assert make_tokenizer(params)('A T-shirt  "doesn\'t" cost $5.50 !') == words


@pytest.mark.parametrize("punctuation", ["drop", "keep"])
def test_whitespace_is_never_a_token(punctuation: Literal["drop", "keep"]) -> None:
    params = TokenizeParams(language="en", lowercase=True, punctuation=punctuation, min_count=1, max_length=9)
    assert make_tokenizer(params)(" A  dog \n runs ") == ["a", "dog", "runs"]


@pytest.mark.parametrize(
    ("language", "caption", "words"),
    [
        ("de", "Ein Hund, z. B. im Gras.", ["ein", "hund", "z.", "b.", "im", "gras"]),
        ("fr", "L'homme mange.", ["l'", "homme", "mange"]),
        ("hi", "एक कुत्ता दौड़ रहा है।", ["एक", "कुत्ता", "दौड़", "रहा", "है"]),
        ("zh", "一只狗，在 T恤 里。", ["一", "只", "狗", "在", "t", "恤", "里"]),
        ("xx", "ein Hund läuft.", ["ein", "hund", "läuft"]),
    ],
)
def test_other_languages_have_their_own_rules(language: str, caption: str, words: list[str]) -> None:
    params = TokenizeParams(language=language, lowercase=True, punctuation="drop", min_count=1, max_length=9)
    assert make_tokenizer(params)(caption) == words


@pytest.mark.slow
def test_every_language_without_a_package_of_its_own_splits_captions() -> None:
    for language in set(language_codes()) - SEGMENTERS.keys():
        params = TokenizeParams(language=language, lowercase=True, punctuation="drop", min_count=1, max_length=9)
        assert make_tokenizer(params)("a b") == ["a", "b"], language


@pytest.mark.parametrize("language", sorted(SEGMENTERS))
def test_without_its_package_a_language_is_an_error_that_names_it(
    language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("sudachipy", "natto", "pythainlp", "pythainlp.tokenize", "pyvi"):
        monkeypatch.setitem(sys.modules, module, None)
    params = TokenizeParams(language=language, lowercase=True, punctuation="drop", min_count=1, max_length=9)
    with pytest.raises(UserError) as error:
        make_tokenizer(params)
    assert str(error.value).endswith(
        f"needs {' and '.join(SEGMENTERS[language])}. Run `pip install 'gridcap[{language}]'`."
    )


@pytest.mark.filterwarnings("ignore:Dictionary.create:DeprecationWarning")  # spaCy's call of SudachiPy
@pytest.mark.parametrize(
    ("module", "language", "caption", "words"),
    [
        ("sudachipy", "ja", "茶色の犬が走る。", ["茶", "色", "の", "犬", "が", "走る"]),
        ("pythainlp", "th", "สุนัขวิ่ง บนหญ้า", ["สุนัข", "วิ่ง", "บน", "หญ้า"]),
        ("pyvi", "vi", "Sinh viên chạy.", ["sinh_viên", "chạy"]),
    ],
)
def test_installed_packages_split_captions(module: str, language: str, caption: str, words: list[str]) -> None:
    pytest.importorskip(module)
    params = TokenizeParams(language=language, lowercase=True, punctuation="drop", min_count=1, max_length=9)
    assert make_tokenizer(params)(caption) == words


@pytest.mark.slow
def test_spacy_is_imported_without_torch_which_can_be_imported_later() -> None:
    code = """
import sys
from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer
make_tokenizer(TokenizeParams(language="en", lowercase=True, punctuation="drop", min_count=1, max_length=9))
assert not [name for name in sys.modules if name.partition(".")[0] == "torch"]
import torch
torch.zeros(1)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
