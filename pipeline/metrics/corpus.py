"""What is scored: captions beside their references, as words; and what all scores say of themselves."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import __version__

Words = Sequence[str]

LIBRARY = f"gridcap {__version__}"
"""The code that made a score, as it is stored beside the score."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """N images with one caption each, the hypothesis, beside captions to compare it with."""

    image_ids: tuple[int, ...]
    """Ascending."""
    hypotheses: tuple[Words, ...]
    references: tuple[Sequence[Words], ...]
    """At least one for each image."""
    tokens: str
    """How captions became words, in a phrase to store beside scores."""

    @property
    def protocol(self) -> tuple[str, str]:
        """What every score of these captions says of itself."""
        numbers = sorted({len(captions) for captions in self.references})
        told = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        return f"tokens: {self.tokens}", f"references: {told} an image"


def check_corpus(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    """Raise `ValueError` unless there are images, each with one hypothesis and at least one reference."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but references for {len(references)} images")
    if not hypotheses:
        raise ValueError("no images to score")
    for index, captions in enumerate(references):
        if not captions:
            raise ValueError(f"the image at index {index} has no reference")
