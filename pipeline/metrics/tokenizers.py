"""Tokenizes hypotheses and references for scoring: `spacy`, the pipeline's tokenizer, or `ptb`, coco-caption's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

from pipeline.captions.languages import ENGLISH, Language, is_unsegmented, require_segmented
from pipeline.captions.tokenization import Tokenization
from pipeline.captions.tokenizer import TokenizeParams, describe_tokenizer, make_tokenizer
from pipeline.errors import UserError
from pipeline.metrics.corpus import Corpus, Words
from pipeline.metrics.java import UnavailableError
from pipeline.metrics.ptb import PTB, tokenize_ptb
from pipeline.params import check

TokenizerName = Literal["spacy", "ptb"]

# Splitting words uses neither the minimum count nor the maximum length.
SPACY_PARAMS = TokenizeParams(language=ENGLISH, lowercase=True, punctuation="drop", min_count=1, max_length=1)
"""Params of the tokenizer `spacy` of untokenized English captions."""
SPACY = describe_tokenizer(SPACY_PARAMS)
"""Tokenization of these params."""


def build_corpora(
    tokenizer: TokenizerName,
    language: str,
    references: Mapping[int, Sequence[str]],
    systems: Sequence[Mapping[int, str]],
) -> list[Corpus]:
    """Tokenize the captions of each system and the references of their images.

    Args:
        tokenizer: Tokenizer of captions and references.
        language: Code of their language.
        references: Untokenized references by image id; images without a hypothesis are ignored.
        systems: Untokenized captions of each system by image id, all of the same images.

    Returns:
        One corpus per system.

    Raises:
        UserError: The tokenizer is `ptb`, and Java is missing or fails, or the language is not English; or the language
            is unknown, needs a missing package, or does not split the captions into words.
    """
    check(language, "language", Language, f"tokenizer {tokenizer}")
    if tokenizer == "ptb" and language != ENGLISH:
        raise UserError(f"tokenizer ptb: is for English, and the language is {language}. Use the tokenizer spacy.")
    image_ids = sorted(systems[0])
    texts = [caption for image_id in image_ids for caption in references[image_id]]
    texts += [system[image_id] for system in systems for image_id in image_ids]
    captions, tokenization = _tokenize(tokenizer, language, texts)  # in one call, since Java is slow to start
    num_unsegmented = sum(is_unsegmented(" ".join(words)) for words in captions)
    require_segmented(num_unsegmented, len(captions), language, f"tokenizer {tokenizer}", "language")
    tokenized = iter(captions)
    tokenized_references = tuple(_take(tokenized, len(references[image_id])) for image_id in image_ids)
    return [
        Corpus(
            image_ids=tuple(image_ids),
            hypotheses=tuple(_take(tokenized, len(image_ids))),
            references=tokenized_references,
            tokenization=tokenization,
        )
        for _ in systems
    ]


def _tokenize(tokenizer: TokenizerName, language: str, texts: Sequence[str]) -> tuple[list[list[str]], Tokenization]:
    if tokenizer == "spacy":
        params = replace(SPACY_PARAMS, language=language)
        split_words = make_tokenizer(params)
        return [split_words(text) for text in texts], describe_tokenizer(params)
    try:
        return tokenize_ptb(texts), PTB
    except UnavailableError as error:
        raise UserError(f"tokenizer ptb: {error} Alternatively, use the tokenizer spacy.") from None


def _take(captions: Iterator[list[str]], num_captions: int) -> list[Words]:
    return list(islice(captions, num_captions))
