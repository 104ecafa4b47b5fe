"""Diversity of captions. Scores alone do not show it: one generic caption for all images can score well."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise

import numpy as np

from pipeline.metrics.corpus import LIBRARY, Words

PROTOCOL = (
    f"library: {LIBRARY}",
    "tokenizer: that of stage tokenize, also when scores use another",
    "num_distinct_captions: captions that differ in at least one word; distinct_rate: over all captions",
    "vocab_size: distinct words; vocab_coverage: fraction of the decoder's vocabulary that occurs",
    "distinct_bigram_rate: distinct bigrams over all bigrams",
    "bad_endings: fraction of captions without words or with a function word at the end",
    "verbatim_in_train: fraction of captions that are word for word a train caption, or a caption of the text",
    "reference: the first caption of each image in the dataset",
)


# fmt: off
FUNCTION_WORDS = frozenset(
    {
        "a",
        "an",
        "the",
        "this",
        "these",
        "that",
        "some",
        "his",
        "her",
        "its",
        "their",
        "and",
        "or",
        "but",
        "as",
        "in",
        "on",
        "at",
        "of",
        "to",
        "by",
        "for",
        "with",
        "from",
        "into",
        "onto",
        "over",
        "under",
        "near",
        "behind",
        "beside",
        "between",
        "through",
        "is",
        "are",
        "was",
        "were",
        "be",
        "am",
        "which",
        "who",
        "while",
    }
)
# fmt: on
"""English words that do not end a sentence."""


def ends_badly(words: Words) -> bool:
    """Whether a caption has no words or ends in one of `FUNCTION_WORDS`, as if it had been cut off."""
    return not words or words[-1].lower() in FUNCTION_WORDS


def diversity(
    captions: Sequence[Words], vocabulary: AbstractSet[str], train_captions: AbstractSet[str]
) -> dict[str, int | float | None]:
    """Compute diversity statistics, as JSON values. A fraction of nothing, as of bigrams, is None.

    Args:
        captions: Tokenized captions, at least one.
        vocabulary: Words of the decoder's vocabulary.
        train_captions: Captions of the train split and of the text: words joined by spaces.
    """
    texts = [tuple(words) for words in captions]
    lengths = [len(words) for words in texts]
    distinct_words = {word for words in texts for word in words}
    bigrams = [bigram for words in texts for bigram in pairwise(words)]
    return {
        "num_captions": len(texts),
        "words_per_caption": round(float(np.mean(lengths)), 3),
        "min_length": min(lengths),
        "max_length": max(lengths),
        "num_distinct_captions": len(set(texts)),
        "distinct_rate": _rate(len(set(texts)), len(texts)),
        "vocab_size": len(distinct_words),
        "vocab_coverage": _rate(len(distinct_words & vocabulary), len(vocabulary)),
        "distinct_bigram_rate": _rate(len(set(bigrams)), len(bigrams)),
        "bad_endings": _rate(sum(map(ends_badly, texts)), len(texts)),
        "verbatim_in_train": _rate(sum(" ".join(words) in train_captions for words in texts), len(texts)),
    }


def _rate(count: int, total: int) -> float | None:
    return round(count / total, 6) if total else None
