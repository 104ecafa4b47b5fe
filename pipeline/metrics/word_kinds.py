"""The kind of each word, such as noun or verb, by spaCy's part-of-speech tagger, where it is installed."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path

from pipeline.metrics.corpus import Words
from pipeline.metrics.java import UnavailableError

TAGGER = "en_core_web_sm"
"""spaCy's small pipeline for English, a package of its own."""


def word_kinds(words: AbstractSet[str], captions: Iterable[Words], tagger: str | Path = TAGGER) -> dict[str, str]:
    """Find the kind of words: their most frequent part of speech in captions.

    Args:
        words: The words.
        captions: Tokenized captions. Words that do not occur in them have no kind.
        tagger: Name or folder of a spaCy pipeline with a part-of-speech tagger.

    Returns:
        The kind of each word: a part of speech of Universal Dependencies in lowercase, such as `noun`, `verb`, `adj`.

    Raises:
        UnavailableError: The spaCy pipeline is not installed.
    """
    import spacy
    from spacy.tokens import Doc

    try:
        pipeline = spacy.load(tagger, exclude=["parser", "ner", "lemmatizer"])
    except OSError:
        raise UnavailableError(
            f"spaCy's {tagger} is not installed. Install it with `python -m spacy download {tagger}`."
        ) from None
    documents = (Doc(pipeline.vocab, words=list(caption)) for caption in captions if not words.isdisjoint(caption))
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for document in pipeline.pipe(documents):
        for token in document:
            if token.text in words:
                counts[token.text][token.pos_.lower()] += 1
    return {word: max(sorted(kinds), key=kinds.__getitem__) for word, kinds in counts.items()}
