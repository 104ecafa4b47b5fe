"""Tokenizes hypotheses and references for scoring: `spacy`, the pipeline's tokenizer, or `ptb`, coco-caption's."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal

from pipeline.captions.tokenization import installed_version, spacy_tokenization
from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer
from pipeline.errors import UserError
from pipeline.metrics.corpus import Corpus, Words
from pipeline.metrics.java import UnavailableError
from pipeline.metrics.ptb import PTB, tokenize_ptb

TokenizerName = Literal["spacy", "ptb"]

# Splitting words uses neither the minimum count nor the maximum length.
SPACY_PARAMS = TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_length=1)
"""Params of the tokenizer `spacy` of untokenized captions."""
SPACY = spacy_tokenization(
    lowercase=SPACY_PARAMS.lowercase,
    punctuation=SPACY_PARAMS.punctuation,
    spacy_version=installed_version("spacy"),
)
"""Tokenization of these params."""


def build_corpora(
    tokenizer: TokenizerName, references: Mapping[int, Sequence[str]], systems: Sequence[Mapping[int, str]]
) -> list[Corpus]:
    """Tokenize the captions of each system and the references of their images.

    Args:
        tokenizer: Tokenizer of captions and references.
        references: Untokenized references by image id; images without a hypothesis are ignored.
        systems: Untokenized captions of each system by image id, all of the same images.

    Returns:
        One corpus per system.

    Raises:
        UserError: The tokenizer is `ptb`, and Java is missing or fails.
    """
    image_ids = sorted(systems[0])
    texts = [caption for image_id in image_ids for caption in references[image_id]]
    texts += [captions[image_id] for captions in systems for image_id in image_ids]
    tokenized = iter(_tokenize(tokenizer, texts))  # in one call, since Java is slow to start
    tokenized_references = tuple(_take(tokenized, len(references[image_id])) for image_id in image_ids)
    return [
        Corpus(
            image_ids=tuple(image_ids),
            hypotheses=tuple(_take(tokenized, len(image_ids))),
            references=tokenized_references,
            tokenization=PTB if tokenizer == "ptb" else SPACY,
        )
        for _ in systems
    ]


def _tokenize(tokenizer: TokenizerName, texts: Sequence[str]) -> list[list[str]]:
    if tokenizer == "spacy":
        split_words = make_tokenizer(SPACY_PARAMS)
        return [split_words(text) for text in texts]
    try:
        return tokenize_ptb(texts)
    except UnavailableError as error:
        raise UserError(f"tokenizer ptb: {error} Alternatively, use the tokenizer spacy.") from None


def _take(captions: Iterator[list[str]], num_captions: int) -> list[Words]:
    return list(islice(captions, num_captions))
