"""Languages of captions: their codes, how their words are joined to a text, and captions that were not split."""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from pipeline.errors import UserError

ENGLISH = "en"
"""The language of METEOR, SPICE and the PTB tokenizer."""
SEGMENTERS = {
    "ja": ("sudachipy", "sudachidict_core"),
    "ko": ("natto-py",),
    "th": ("pythainlp",),
    "vi": ("pyvi",),
}
"""Packages that spaCy needs to split captions into words, by language; other languages need none."""
WITHOUT_SPACES = frozenset({"ja", "th", "zh"})
"""Languages written without spaces between words that spaCy splits; Chinese into characters."""

# A run of letters that is longer than a word: Han, Hiragana and Katakana; Thai, Lao, Tibetan, Myanmar and Khmer.
_UNSEGMENTED = re.compile(r"[\u3040-\u9fff\U00020000-\U0003ffff]{7}|[\u0e00-\u109f\u1780-\u17ff]{20}")


def language_codes() -> list[str]:
    """Return the codes of all languages of spaCy, without importing it; none if spaCy is not installed."""
    spec = find_spec("spacy")
    if spec is None or spec.origin is None:
        return []
    return sorted(path.parent.name for path in (Path(spec.origin).parent / "lang").glob("*/__init__.py"))


def _require_known(language: str) -> str:
    codes = language_codes()
    if codes and language not in codes:
        raise ValueError(f"must be one of {', '.join(codes)} (a language of spaCy; xx is any), got {language!r}")
    return language


Language = Annotated[str, AfterValidator(_require_known)]
"""Code of a language of spaCy."""


def join_words(words: Sequence[str], language: str) -> str:
    """Join the words of a caption to its text, without spaces in languages that have none.

    Args:
        words: Words from `make_tokenizer`.
        language: Code of their language.
    """
    text = word_separator(language).join(words)
    # Vietnamese words have several syllables, which the tokenizer joins by underscores.
    return text.replace("_", " ") if language == "vi" else text


def word_separator(language: str) -> str:
    """Return what stands between two words of a language: a space or nothing."""
    return "" if language in WITHOUT_SPACES else " "


def is_unsegmented(line: str) -> bool:
    """Return whether a tokenized caption has whole phrases as words, since its script has no spaces.

    Args:
        line: The words of the caption, joined by spaces.
    """
    return not line.isascii() and _UNSEGMENTED.search(line) is not None


def require_segmented(num_unsegmented: int, num_captions: int, language: str, source: str, setting: str) -> None:
    """Check that a language splits the captions of a dataset into words.

    Args:
        num_unsegmented: Captions for which `is_unsegmented` is true.
        num_captions: All captions.
        language: Language by whose rules the captions were split.
        source: File of the captions, for the error message.
        setting: Name of the setting of the language.

    Raises:
        UserError: Most captions are unsegmented, in a language with spaces between words.
    """
    if language not in WITHOUT_SPACES and 2 * num_unsegmented > num_captions:
        raise UserError(
            f"{source}: {num_unsegmented} of {num_captions} captions have no spaces between words, so"
            f" {setting}={language} does not split them. Set {setting} to their language, such as zh, ja or th."
        )
