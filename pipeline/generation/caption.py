"""The type of a generated caption, shared by the search, the files, the app and the public API."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A generated caption with its log-probabilities and attention.

    Shapes: `T` words, `P` regions in a grid of `H` x `W`.
    """

    words: tuple[str, ...]
    log_probability: float
    """Sum of the log-probabilities of the words, and of `<end>` if the caption reached it, in nats."""
    score: float
    """`log_probability` after length normalization; beam search ranks captions by it."""
    word_log_probabilities: tuple[float, ...]
    """Log-probability of each word given the words before it, in nats; without `<end>`."""
    attention: NDArray[np.floating[Any]] | None = field(default=None, compare=False, repr=False)
    """Attention weights of each word [T, H, W]; None if they were not stored. They sum to 1 over the grid, or to less
    if the decoder has a visual sentinel, whose weight is the rest. Captions from `search`, which has no grid size, have
    [T, P]."""
    alternatives: tuple["Caption", ...] = ()
    """Further captions of the same image, best first; empty unless `n_best` is above 1."""

    @property
    def text(self) -> str:
        """The words joined by spaces."""
        return " ".join(self.words)

    @property
    def word_probabilities(self) -> tuple[float, ...]:
        """Probability of each word given the words before it."""
        return tuple(map(math.exp, self.word_log_probabilities))

    @property
    def confidence(self) -> float:
        """Geometric mean of the word probabilities; 0 for a caption without words."""
        if not self.words:
            return 0.0
        return math.exp(math.fsum(self.word_log_probabilities) / len(self.words))

    def reshape_attention(self, grid: tuple[int, int]) -> "Caption":
        """Return the caption with attention [T, P] reshaped to the height and width of `grid`: [T, H, W]."""
        assert self.attention is not None, "captions from a search have attention"
        return replace(self, attention=self.attention.reshape(-1, *grid))
