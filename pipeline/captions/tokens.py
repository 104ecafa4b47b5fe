"""From captions to token ids: the tokenizer, and `tokens.h5`, which this module alone reads and writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Schema
from pipeline.captions.records import SPLITS, Record, Split
from pipeline.captions.tokenization import Tokenization, installed_version, spacy_tokenization
from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer
from pipeline.captions.vocabulary import END, PAD, SPECIALS, START, Vocabulary
from pipeline.errors import UserError
from pipeline.hdf5 import open_artifact

SCHEMA = Schema("gridcap.tokens", 2)
_REMEDY = "Run `dvc repro -f -s tokenize`."
TOKENS_FILE = "tokens.h5"
VOCABULARY_FILE = "vocabulary.json"


@dataclass(frozen=True, kw_only=True)
class CaptionTokens:
    """The captions of one split, in order of image id and then as the dataset has them."""

    tokens: NDArray[np.int32]
    """[N, T] ids: `<start>`, the words, `<end>`, then `<pad>`. A caption that was cut has no `<end>`."""
    length: NDArray[np.int32]
    """[N] ids of the row before the padding begins."""
    image_id: NDArray[np.int64]
    """[N] the image that the caption describes."""
    captions: tuple[str, ...]
    """N captions as their words joined by spaces, whole and with the words that the vocabulary lacks."""


@dataclass(frozen=True, kw_only=True)
class TokenizedDataset:
    """Every split's tokens, the vocabulary of the train split, and what happened on the way."""

    vocabulary: Vocabulary
    splits: dict[Split, CaptionTokens]
    counts: dict[str, int | float]


def tokenize(records: Sequence[Record], params: TokenizeParams, source: Path) -> TokenizedDataset:
    """Tokenize every caption; build the vocabulary from the train captions alone.

    Raises `UserError`, naming `source`, where an image has no caption with a word in it.
    """
    split_words = make_tokenizer(params)
    captions: dict[Split, list[tuple[int, list[str]]]] = {split: [] for split in SPLITS}
    wordless = 0
    for record in records:
        worded = [words for words in map(split_words, record.captions) if words]
        if not worded:
            raise UserError(
                f"{source}: no caption of image {record.image_id} ({record.file}) has a word in it: "
                f"{list(record.captions)}; mend the captions or leave the image out"
            )
        wordless += len(record.captions) - len(worded)
        captions[record.split].extend((record.image_id, words) for words in worded)
    vocabulary = Vocabulary.build((words for _, words in captions["train"]), params.min_count)
    if len(vocabulary) == len(SPECIALS):
        raise UserError(f"{source}: no word occurs tokenize.min_count = {params.min_count} times; lower it")
    longest = max(len(words) for rows in captions.values() for _, words in rows)
    width = 2 + min(longest, params.max_length)
    splits = {split: _arrays(captions[split], vocabulary, params.max_length, width) for split in SPLITS}
    return TokenizedDataset(
        vocabulary=vocabulary, splits=splits, counts=_counts(captions, vocabulary, params, wordless)
    )


def _arrays(
    captions: Sequence[tuple[int, list[str]]], vocabulary: Vocabulary, max_length: int, width: int
) -> CaptionTokens:
    tokens = np.full((len(captions), width), PAD, dtype=np.int32)
    length = np.zeros(len(captions), dtype=np.int32)
    for row, (_, words) in enumerate(captions):
        ids = [START, *vocabulary.encode(words[:max_length])]
        if len(words) <= max_length:
            ids.append(END)
        tokens[row, : len(ids)] = ids
        length[row] = len(ids)
    image_id = np.array([image_id for image_id, _ in captions], dtype=np.int64)
    return CaptionTokens(
        tokens=tokens,
        length=length,
        image_id=image_id,
        captions=tuple(" ".join(words) for _, words in captions),
    )


def _counts(
    captions: dict[Split, list[tuple[int, list[str]]]],
    vocabulary: Vocabulary,
    params: TokenizeParams,
    wordless: int,
) -> dict[str, int | float]:
    known = frozenset(vocabulary.words)
    counts: dict[str, int | float] = {
        "words_known": len(vocabulary) - len(SPECIALS),
        "captions_without_words": wordless,
    }
    for split, rows in captions.items():
        words = sum(len(words) for _, words in rows)
        unknown = sum(word not in known for _, words in rows for word in words)
        counts[f"{split}_captions"] = len(rows)
        counts[f"{split}_captions_cut"] = sum(len(words) > params.max_length for _, words in rows)
        counts[f"{split}_words_a_caption"] = round(words / max(1, len(rows)), 3)
        counts[f"{split}_share_unknown"] = round(unknown / max(1, words), 6)
    return counts


def write_tokens(path: Path, dataset: TokenizedDataset, params: TokenizeParams, fingerprint: str) -> None:
    """Write `tokens.h5`: a group a split, described by attributes."""
    descriptions = {
        "tokens": "ids of <start>, the words, <end>, then <pad> (0); an id is a position in vocabulary.json",
        "length": "ids of the row before the padding begins",
        "image_id": "the image that the caption describes",
        "caption": "the caption's words joined by spaces, before rare words became <unk>",
    }
    with h5py.File(path, "w") as file:
        file.attrs.update(
            {
                "schema": SCHEMA.name,
                "schema_version": SCHEMA.version,
                "fingerprint": fingerprint,
                "vocabulary_digest": dataset.vocabulary.digest,
                "tokenizer": "spacy.blank('en')",
                "tokenizer_version": installed_version("spacy"),
                "lowercase": params.lowercase,
                "punctuation": params.punctuation,
            }
        )
        for split, captions in dataset.splits.items():
            group = file.create_group(split)
            group["tokens"] = captions.tokens
            group["length"] = captions.length
            group["image_id"] = captions.image_id
            group.create_dataset("caption", data=list(captions.captions), dtype=h5py.string_dtype())
            for name, description in descriptions.items():
                group[name].attrs["description"] = description


def read_tokens(path: Path, split: Split) -> CaptionTokens:
    """Read one split of `tokens.h5`.

    Raises `UserError`, naming the file, where it is missing, no HDF5 file or of another schema.
    """
    with open_artifact(path, SCHEMA, _REMEDY) as file:
        group = file[split]
        return CaptionTokens(
            tokens=group["tokens"][:],
            length=group["length"][:],
            image_id=group["image_id"][:],
            captions=tuple(group["caption"].asstr()[:]),
        )


def require_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """See that the ids of a `tokens.h5` are positions in this vocabulary.

    Raises `UserError` where they are of another, and as `read_tokens` does.
    """
    with open_artifact(path, SCHEMA, _REMEDY) as file:
        found = file.attrs["vocabulary_digest"]
    if found != vocabulary.digest:
        raise UserError(
            f"{path}: its ids are of the vocabulary {found}, but {VOCABULARY_FILE} beside it is {vocabulary.digest};"
            " make both again with `dvc repro -f -s tokenize`"
        )


def read_tokenization(path: Path) -> Tokenization:
    """Read how the captions of a `tokens.h5` were tokenized.

    Raises `UserError` as `read_tokens` does.
    """
    with open_artifact(path, SCHEMA, _REMEDY) as file:
        return spacy_tokenization(
            lowercase=bool(file.attrs["lowercase"]),
            punctuation=file.attrs["punctuation"],
            spacy_version=file.attrs["tokenizer_version"],
        )


def references(captions: CaptionTokens) -> dict[int, list[list[str]]]:
    """The captions of each image as lists of words, by ascending image id."""
    by_image: dict[int, list[list[str]]] = {}
    for image_id, caption in zip(captions.image_id.tolist(), captions.captions, strict=True):
        by_image.setdefault(image_id, []).append(caption.split(" "))
    return by_image
