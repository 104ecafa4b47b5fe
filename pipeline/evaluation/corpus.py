"""What all scores ask of a corpus of captions, and say of themselves."""

from collections.abc import Sequence

from pipeline import __version__

Words = Sequence[str]

LIBRARY = f"gridcap {__version__}"
"""The code that made a score, as it is stored beside the score."""


def check_corpus(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    """Raise `ValueError` unless there are images, each with one hypothesis and at least one reference."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but references for {len(references)} images")
    if not hypotheses:
        raise ValueError("no images to score")
    for index, captions in enumerate(references):
        if not captions:
            raise ValueError(f"the image at index {index} has no reference")
