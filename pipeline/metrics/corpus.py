"""The input of every metric: tokenized captions with their references."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline import __version__
from pipeline.captions.tokenization import Tokenization

Words = Sequence[str]
"""A tokenized caption."""

LIBRARY = f"gridcap {__version__}"
"""Name and version of this library in protocols."""
LIBRARY_TAG = f"gridcap-{__version__}"
"""Name and version of this library in signatures."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One hypothesis and at least one reference for each of N images."""

    image_ids: tuple[int, ...]
    """N image ids, ascending."""
    hypotheses: tuple[Words, ...]
    """N captions to score."""
    references: tuple[Sequence[Words], ...]
    """The references of each image."""
    tokenization: Tokenization
    """Tokenizer of hypotheses and references."""

    @property
    def protocol(self) -> tuple[str, str]:
        """Protocol lines that all scores of this corpus share."""
        low, high = self._num_references_range
        num_references = str(low) if low == high else f"{low} to {high}"
        return f"tokenizer: {self.tokenization.description}", f"references per image: {num_references}"

    @property
    def signature(self) -> dict[str, str]:
        """Signature fields that all scores of this corpus share."""
        low, high = self._num_references_range
        return {"refs": str(low) if low == high else f"{low}-{high}", **self.tokenization.signature}

    @property
    def _num_references_range(self) -> tuple[int, int]:
        num_references = [len(captions) for captions in self.references]
        return min(num_references), max(num_references)


def ngrams(words: Words, max_order: int) -> Iterator[tuple[str, ...]]:
    """Yield the n-grams of a caption, from single words to those of `max_order` words."""
    for order in range(1, max_order + 1):
        yield from zip(*(words[start:] for start in range(order)), strict=False)


def check_corpus(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    """Raise `ValueError` unless there are images, each with one hypothesis and at least one reference."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but references for {len(references)} images")
    if not hypotheses:
        raise ValueError("no images to score")
    for index, captions in enumerate(references):
        if not captions:
            raise ValueError(f"the image at index {index} has no reference")
