"""The word tokenizer and its params."""

import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.params import params_section


@params_section
class TokenizeParams:
    """Section `tokenize`: how to split captions into words, and which words are in the vocabulary."""

    lowercase: bool
    """Lowercase every caption."""
    punctuation: Literal["drop", "keep"]
    """Whether to drop or keep tokens without a letter or digit."""
    min_count: Annotated[int, Field(ge=1, le=1_000_000)]
    """Minimum occurrences of a word in the train captions; rarer words become `<unk>`."""
    max_length: Annotated[int, Field(ge=1, le=1000)]
    """Maximum words of a caption for training; longer captions are truncated and counted."""


def make_tokenizer(params: TokenizeParams) -> Callable[[str], list[str]]:
    """Return a function that splits a caption into words by spaCy's rules for English."""
    spacy_tokenizer = _import_spacy().blank("en").tokenizer

    def tokenize(caption: str) -> list[str]:
        tokens = [token.text for token in spacy_tokenizer(caption.lower() if params.lowercase else caption)]
        if params.punctuation == "drop":
            return [token for token in tokens if any(character.isalnum() for character in token)]
        return [token for token in tokens if not token.isspace()]

    return tokenize


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
