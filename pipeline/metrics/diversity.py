"""How much captions vary: the other side of scores, which one safe caption for all images may raise."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise

import numpy as np

from pipeline.metrics.corpus import LIBRARY, Words

PROTOCOL = (
    f"library: {LIBRARY}",
    "words: the pipeline's own tokens, whatever the protocol of the scores",
    "distinct: captions that differ in any word; share_distinct: of all captions",
    "vocabulary: distinct words used; share_of_vocabulary: of the words that the decoder knows",
    "distinct_bigrams: as a share of all pairs of neighboring words",
    "seen_in_training: share of captions that are, word for word, a caption of a train image",
    "reference: one caption of each image, the first that the dataset has",
)


def diversity(
    captions: Sequence[Words], known: AbstractSet[str], trained_on: AbstractSet[tuple[str, ...]]
) -> dict[str, int | float]:
    """Count how N captions vary; `known` are the decoder's words, `trained_on` the captions of train images."""
    texts = [tuple(words) for words in captions]
    lengths = [len(words) for words in texts]
    used = {word for words in texts for word in words}
    bigrams = [pair for words in texts for pair in pairwise(words)]
    return {
        "captions": len(texts),
        "words_a_caption": round(float(np.mean(lengths)), 3),
        "shortest": min(lengths),
        "longest": max(lengths),
        "distinct": len(set(texts)),
        "share_distinct": _share(len(set(texts)), len(texts)),
        "vocabulary": len(used),
        "share_of_vocabulary": _share(len(used & known), len(known)),
        "distinct_bigrams": _share(len(set(bigrams)), len(bigrams)),
        "seen_in_training": _share(sum(words in trained_on for words in texts), len(texts)),
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0
