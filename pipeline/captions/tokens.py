"""Token ids of captions, and the reader and writer of `tokens.h5`.

Shapes: `N` captions of a split, `T` ids per caption.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Schema
from pipeline.captions.records import SPLITS, Record, Split
from pipeline.captions.tokenization import Tokenization, installed_version, spacy_tokenization
from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer
from pipeline.captions.vocabulary import END, PAD, REMEDY, SPECIALS, START, VOCABULARY_FILE, Vocabulary
from pipeline.errors import UserError
from pipeline.hdf5 import create_artifact, open_artifact
from pipeline.startup import defer_interrupts

SCHEMA = Schema("gridcap.tokens", 2)
TOKENS_FILE = "tokens.h5"

_DESCRIPTIONS = {
    "tokens": "ids of <start>, the words, <end>, then <pad> (0); an id is an index into vocabulary.json",
    "length": "number of ids before the padding",
    "image_id": "image of the caption",
    "caption": "words of the caption, joined by spaces, before rare words became <unk>",
}

_CaptionWords = tuple[int, list[str]]
"""Image id and words of a caption."""


@dataclass(frozen=True, kw_only=True)
class CaptionTokens:
    """The captions of one split, by image id, then in the dataset's order."""

    tokens: NDArray[np.int32]
    """[N, T] ids: `<start>`, the words, `<end>`, then `<pad>`. A truncated caption has no `<end>`."""
    length: NDArray[np.int32]
    """[N] number of ids before the padding."""
    image_id: NDArray[np.int64]
    """[N] image of the caption."""
    captions: tuple[str, ...]
    """N captions, not truncated: words joined by spaces, including those that are not in the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class TokenizedDataset:
    """Tokens of every split, the vocabulary of the train split, and the metrics of `tokenize`."""

    vocabulary: Vocabulary
    splits: dict[Split, CaptionTokens]
    metrics: dict[str, int | float | None]


def tokenize(records: Sequence[Record], params: TokenizeParams, source: Path) -> TokenizedDataset:
    """Tokenize every caption and build the vocabulary from the train captions.

    Args:
        records: All records, sorted by image id.
        params: Section `tokenize`.
        source: File of the records, for error messages.

    Raises:
        UserError: An image has no caption with a word, or no word occurs `min_count` times.
    """
    split_words = make_tokenizer(params)
    captions: dict[Split, list[_CaptionWords]] = {split: [] for split in SPLITS}
    num_without_words = 0
    for record in records:
        tokenized = [words for words in map(split_words, record.captions) if words]
        if not tokenized:
            raise UserError(
                f"{source}: image {record.image_id} ({record.file}) has no caption with a word: "
                f"{list(record.captions)}. Correct its captions, or remove the image."
            )
        num_without_words += len(record.captions) - len(tokenized)
        captions[record.split].extend((record.image_id, words) for words in tokenized)
    vocabulary = Vocabulary.build((words for _, words in captions["train"]), params.min_count)
    if len(vocabulary) == len(SPECIALS):
        raise UserError(
            f"{source}: no word occurs tokenize.min_count = {params.min_count} times. Lower tokenize.min_count."
        )
    max_num_words = max(len(words) for split_captions in captions.values() for _, words in split_captions)
    row_size = 2 + min(max_num_words, params.max_length)  # T: <start>, the words, <end>
    splits = {split: _to_arrays(captions[split], vocabulary, params.max_length, row_size) for split in SPLITS}
    metrics = {
        "vocab_size": len(vocabulary),
        "num_captions_without_words": num_without_words,
        **_split_metrics(captions, vocabulary, params.max_length),
    }
    return TokenizedDataset(vocabulary=vocabulary, splits=splits, metrics=metrics)


def _to_arrays(
    captions: Sequence[_CaptionWords], vocabulary: Vocabulary, max_length: int, row_size: int
) -> CaptionTokens:
    tokens = np.full((len(captions), row_size), PAD, dtype=np.int32)  # [N, T]
    length = np.zeros(len(captions), dtype=np.int32)  # [N]
    for row, (_, words) in enumerate(captions):
        ids = [START, *vocabulary.encode(words[:max_length])]
        if len(words) <= max_length:
            ids.append(END)
        tokens[row, : len(ids)] = ids
        length[row] = len(ids)
    image_id = np.array([image_id for image_id, _ in captions], dtype=np.int64)  # [N]
    return CaptionTokens(
        tokens=tokens,
        length=length,
        image_id=image_id,
        captions=tuple(" ".join(words) for _, words in captions),
    )


def _split_metrics(
    captions: dict[Split, list[_CaptionWords]], vocabulary: Vocabulary, max_length: int
) -> dict[str, int | float | None]:
    in_vocabulary = frozenset(vocabulary.words)
    metrics: dict[str, int | float | None] = {}
    for split, split_captions in captions.items():
        num_words = sum(len(words) for _, words in split_captions)
        num_unk = sum(word not in in_vocabulary for _, words in split_captions for word in words)
        metrics[f"{split}_num_captions"] = len(split_captions)
        metrics[f"{split}_num_truncated"] = sum(len(words) > max_length for _, words in split_captions)
        metrics[f"{split}_words_per_caption"] = round(num_words / len(split_captions), 3) if split_captions else None
        metrics[f"{split}_unk_rate"] = round(num_unk / num_words, 6) if num_words else None
    return metrics


def write_tokens(path: Path, dataset: TokenizedDataset, params: TokenizeParams, fingerprint: str) -> None:
    """Write `tokens.h5`, with one group per split.

    Args:
        path: The file.
        dataset: The tokens of every split.
        params: The params of `tokenize` that gave `dataset`.
        fingerprint: Fingerprint of params and records, recorded as an attribute.
    """
    tokenization = spacy_tokenization(params.lowercase, params.punctuation, installed_version("spacy"))
    with create_artifact(path, SCHEMA) as file, defer_interrupts():
        file.attrs.update(
            {
                "fingerprint": fingerprint,
                "vocabulary_digest": dataset.vocabulary.digest,
                "tokenizer": tokenization.source,
                "tokenizer_version": tokenization.version,
                "lowercase": tokenization.lowercase,
                "punctuation": tokenization.punctuation,
            }
        )
        for split, captions in dataset.splits.items():
            group = file.create_group(split)
            group["tokens"] = captions.tokens
            group["length"] = captions.length
            group["image_id"] = captions.image_id
            group.create_dataset("caption", data=list(captions.captions), dtype=h5py.string_dtype())
            for name, description in _DESCRIPTIONS.items():
                group[name].attrs["description"] = description


def read_tokens(path: Path, split: Split, skipped_ids: Set[int] = frozenset()) -> CaptionTokens:
    """Read one split of `tokens.h5`.

    Args:
        path: The file.
        split: The split to read.
        skipped_ids: Images whose captions are left out.

    Raises:
        UserError: The file is missing, damaged, or of another schema.
    """
    with open_artifact(path, SCHEMA, REMEDY) as file:
        group = file[split]
        image_id = group["image_id"][:]
        rows = np.isin(image_id, list(skipped_ids), invert=True)
        return CaptionTokens(
            tokens=group["tokens"][:][rows],
            length=group["length"][:][rows],
            image_id=image_id[rows],
            captions=tuple(group["caption"].asstr()[:][rows]),
        )


def require_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """Check that `tokens.h5` was written with a vocabulary.

    Args:
        path: The file.
        vocabulary: The expected vocabulary.

    Raises:
        UserError: The file cannot be read, or was written with another vocabulary.
    """
    with open_artifact(path, SCHEMA, REMEDY) as file:
        digest = file.attrs["vocabulary_digest"]
    if digest != vocabulary.digest:
        raise UserError(
            f"{path}: was written with vocabulary {digest}, but {VOCABULARY_FILE} has digest {vocabulary.digest}."
            f" {REMEDY}"
        )


def read_tokenization(path: Path) -> Tokenization:
    """Read from `tokens.h5` how its captions were tokenized.

    Raises:
        UserError: The file is missing, damaged, or of another schema.
    """
    with open_artifact(path, SCHEMA, REMEDY) as file:
        return spacy_tokenization(
            lowercase=bool(file.attrs["lowercase"]),
            punctuation=file.attrs["punctuation"],
            spacy_version=file.attrs["tokenizer_version"],
        )


def group_references(captions: CaptionTokens) -> dict[int, list[list[str]]]:
    """Group the captions of a split, as lists of words, by image id, in ascending order."""
    by_image: dict[int, list[list[str]]] = {}
    for image_id, caption in zip(captions.image_id.tolist(), captions.captions, strict=True):
        by_image.setdefault(image_id, []).append(caption.split(" "))
    return by_image
