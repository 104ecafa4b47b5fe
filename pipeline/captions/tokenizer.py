"""The tokenizer: from a caption to its words."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from pipeline.params import params_section


@params_section
class TokenizeParams:
    """How captions become words, and which words are known."""

    lowercase: bool
    """Whether words are lower-cased: `A` and `a` are then one word."""
    punctuation: Literal["drop", "keep"]
    """Whether tokens without any letter or digit stay words of the caption."""
    min_count: Annotated[int, Field(ge=1)]
    """Times a word must occur in the train captions to be known; rarer ones become `<unk>`."""
    max_length: Annotated[int, Field(ge=1)]
    """Words of a caption that are kept for training; what is beyond is cut off, and counted."""


def make_tokenizer(params: TokenizeParams) -> Callable[[str], list[str]]:
    """Make the function from a caption to its words: spaCy's English rules, then case and punctuation."""
    import spacy

    split = spacy.blank("en").tokenizer

    def words(caption: str) -> list[str]:
        tokens = [token.text for token in split(caption.lower() if params.lowercase else caption)]
        if params.punctuation == "drop":
            return [token for token in tokens if any(character.isalnum() for character in token)]
        return [token for token in tokens if not token.isspace()]

    return words
