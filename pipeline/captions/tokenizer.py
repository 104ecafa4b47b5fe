"""The word tokenizer and its params."""

import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.captions.languages import SEGMENTERS, Language
from pipeline.captions.tokenization import Tokenization, spacy_tokenization, spacy_version
from pipeline.errors import UserError
from pipeline.params import params_section


@params_section
class TokenizeParams:
    """Section `tokenize`: how to split captions into words, and which words are in the vocabulary."""

    language: Language
    """Language of the captions, by its code in spaCy: `en`, `de`, `fr`, `hi`, `zh` (characters), `xx` (any), ...; `ja`,
    `ko`, `th` and `vi` need a further package."""
    lowercase: bool
    """Lowercase every caption."""
    punctuation: Literal["drop", "keep"]
    """Whether to drop or keep tokens without a letter or digit."""
    min_count: Annotated[int, Field(ge=1, le=1_000_000)]
    """Minimum occurrences of a word in the train captions and `train.text`; rarer words become `<unk>`."""
    max_length: Annotated[int, Field(ge=1, le=1000)]
    """Maximum words of a caption for training; longer captions are truncated and counted."""


def make_tokenizer(params: TokenizeParams) -> Callable[[str], list[str]]:
    """Return a function that splits a caption into words by spaCy's rules for its language.

    Spaces within a word, which only Vietnamese has, become underscores.

    Raises:
        UserError: A package that spaCy needs for the language is missing.
    """
    spacy_tokenizer = _load_tokenizer(params.language)

    def tokenize(caption: str) -> list[str]:
        tokens = [token.text for token in spacy_tokenizer(caption.lower() if params.lowercase else caption)]
        if params.language in SEGMENTERS:
            tokens = ["_".join(token.split()) for token in tokens]
        if params.punctuation == "drop":
            return [token for token in tokens if any(character.isalnum() for character in token)]
        return [token for token in tokens if token and not token.isspace()]

    return tokenize


def describe_tokenizer(params: TokenizeParams) -> Tokenization:
    """Describe the tokenizer of `make_tokenizer`."""
    return spacy_tokenization(params.language, params.lowercase, params.punctuation, spacy_version(params.language))


def _load_tokenizer(language: str) -> Any:
    spacy = _import_spacy()
    if language not in SEGMENTERS:
        return spacy.blank(language).tokenizer
    try:
        tokenizer = spacy.blank(language).tokenizer
        tokenizer("a")  # loads dictionary and library, which may be missing
    except ImportError as error:
        raise UserError(
            f"language {language}: splitting captions into words needs {' and '.join(SEGMENTERS[language])}."
            f" Run `pip install 'gridcap[{language}]'`."
        ) from error
    except Exception as error:  # MeCab, of Korean, has errors of its own
        raise UserError(
            f"language {language}: {' and '.join(SEGMENTERS[language])} cannot split captions into words ({error})."
            " Install its library and dictionary."
        ) from error
    return tokenizer


def _import_spacy() -> Any:
    """Import spaCy without PyTorch, which it imports where installed; its tokenizer does not use it.

    PyTorch would take 450 MB and two seconds more.
    """
    has_torch = "torch" in sys.modules
    if not has_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes its import an ImportError
    try:
        import spacy
    finally:
        if not has_torch:
            del sys.modules["torch"]
    return spacy
