"""How captions become the words that are compared: the protocols `plain` and `ptb`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer
from pipeline.errors import UserError
from pipeline.metrics import ptb
from pipeline.metrics.corpus import Corpus, Words
from pipeline.metrics.java import UnavailableError

TokenizerName = Literal["spacy", "ptb"]

SPACY = "spacy, spacy.blank('en'), lower-cased, punctuation dropped"
PTB = f"ptb, {ptb.PROTOCOL}"


def corpora(
    tokenizer: TokenizerName, references: Mapping[int, Sequence[str]], systems: Sequence[Mapping[int, str]]
) -> list[Corpus]:
    """Put each system's captions, as text, beside the references, all as words: a corpus for each system.

    All systems caption the same images, which have references; `references` may have others too. Raises `UserError`
    where the protocol is `ptb` and this machine cannot follow it.
    """
    image_ids = sorted(systems[0])
    texts = [caption for image_id in image_ids for caption in references[image_id]]
    texts += [captions[image_id] for captions in systems for image_id in image_ids]
    words = iter(_words(tokenizer, texts))
    wanted = tuple(_take(words, len(references[image_id])) for image_id in image_ids)
    return [
        Corpus(
            image_ids=tuple(image_ids),
            hypotheses=tuple(_take(words, len(image_ids))),
            references=wanted,
            tokens=PTB if tokenizer == "ptb" else SPACY,
        )
        for _ in systems
    ]


def _words(tokenizer: TokenizerName, texts: Sequence[str]) -> list[list[str]]:
    if tokenizer == "spacy":
        split = make_tokenizer(TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_length=1))
        return [split(text) for text in texts]
    try:
        return ptb.ptb_words(texts)
    except UnavailableError as error:
        raise UserError(f"the protocol ptb cannot be followed: {error}; or choose the protocol plain") from None


def _take(words: Iterator[list[str]], count: int) -> list[Words]:
    return [next(words) for _ in range(count)]
