"""Token ids of captions, and the reader and writer of `tokens.h5`.

Shapes: `N` captions of a split, `M` ids of all captions, `T` ids per caption, `W` words of all captions.
"""

from array import array
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.artifacts import Schema
from pipeline.captions.languages import is_unsegmented, require_segmented
from pipeline.captions.records import SPLITS, Record, Split, empty_split_error
from pipeline.captions.text import HeldOutImages, TextCaption
from pipeline.captions.tokenization import Tokenization, spacy_tokenization
from pipeline.captions.tokenizer import TokenizeParams, describe_tokenizer, make_tokenizer
from pipeline.captions.vocabulary import END, PAD, REMEDY, SPECIALS, START, UNK, VOCABULARY_FILE, Vocabulary
from pipeline.errors import UserError
from pipeline.hdf5 import content_digest, create_artifact, open_artifact, read_dataset
from pipeline.startup import defer_interrupts

SCHEMA = Schema("gridcap.tokens", 5)
TOKENS_FILE = "tokens.h5"

Group = Literal["train", "val", "test", "text"]
"""Group of `tokens.h5`: a split, or the captions without images."""
GROUPS: tuple[Group, ...] = get_args(Group)

_COLUMNS: dict[str, tuple[np.dtype[Any], str]] = {
    "ids": (np.dtype("<i4"), "ids of all captions: <start>, the words, <end>; an id is an index into vocabulary.json"),
    "offset": (np.dtype("<i8"), "caption i has ids[offset[i]:offset[i + 1]]"),
    "image_id": (np.dtype("<i8"), "image of each caption; in group text, the number of the caption"),
    "text": (np.dtype("u1"), "UTF-8 text, one caption per line: words joined by spaces, before any became <unk>"),
}


@dataclass(frozen=True, kw_only=True)
class CaptionTokens:
    """The captions of one split, by image id, then in the dataset's order."""

    ids: NDArray[np.int32]
    """[M] ids of all captions, one after another: `<start>`, the words, `<end>`. A truncated caption has no `<end>`."""
    offset: NDArray[np.int64]
    """[N + 1] position of each caption's first id in `ids`, and M."""
    image_id: NDArray[np.int64]
    """[N] image of the caption; a caption without an image has its number."""
    text: str
    """N lines, one per caption, not truncated: words joined by spaces, including those that are not in the
    vocabulary."""

    @property
    def length(self) -> NDArray[np.int64]:
        """Number of ids of each caption, [N]."""
        return np.diff(self.offset)

    @property
    def first_of_image(self) -> NDArray[np.int64]:
        """Index of the first caption of each image."""
        return np.flatnonzero(np.diff(self.image_id, prepend=-1))

    @property
    def captions(self) -> list[str]:
        """The lines of `text`."""
        return self.text.split("\n")[:-1]

    def without_images(self, image_ids: Set[int]) -> "CaptionTokens":
        """Return the captions of all other images."""
        is_kept = np.isin(self.image_id, list(image_ids), invert=True)  # [N]
        length = self.length
        return CaptionTokens(
            ids=self.ids[np.repeat(is_kept, length)],
            offset=np.append(0, np.cumsum(length[is_kept])),
            image_id=self.image_id[is_kept],
            text="".join(f"{line}\n" for line, kept in zip(self.captions, is_kept, strict=True) if kept),
        )

    def padded(self, rows: ArrayLike) -> NDArray[np.int32]:
        """Return the ids of some captions, padded with `<pad>` to the longest: [..., T].

        Args:
            rows: Indices of the captions, an array of any shape.
        """
        index = np.asarray(rows)[..., np.newaxis]
        start, end = self.offset[index], self.offset[index + 1]
        position = start + np.arange((end - start).max(initial=0))  # [..., T]
        is_id = position < end  # [..., T]
        return np.where(is_id, self.ids[np.where(is_id, position, 0)], np.int32(PAD))


@dataclass(frozen=True, kw_only=True)
class TokenizedDataset:
    """Tokens of every split and of the text, the vocabulary of train split and text, and the metrics of `tokenize`."""

    vocabulary: Vocabulary
    splits: dict[Split, CaptionTokens]
    text: CaptionTokens
    """Captions without images; none where `tokenize` read no text."""
    metrics: dict[str, int | float | None]


@dataclass
class _SplitWords:
    """The captions of one split, as numbers of words in the order in which the dataset first has them."""

    numbers: "array[int]" = field(default_factory=lambda: array("i"))
    """[W] number of each word."""
    num_words: "array[int]" = field(default_factory=lambda: array("i"))
    """[N] words of the caption."""
    image_id: "array[int]" = field(default_factory=lambda: array("q"))
    """[N] image of the caption."""
    text: bytearray = field(default_factory=bytearray)


def tokenize(
    records: Iterable[Record], params: TokenizeParams, source: Path, text: Sequence[TextCaption] = ()
) -> TokenizedDataset:
    """Tokenize every caption and build the vocabulary from the train captions and the text.

    Captions of the text that belong to images of val or test are left out and counted (see `HeldOutImages`).

    Args:
        records: All records, sorted by image id; read once, one after another.
        params: Section `tokenize`.
        source: File of the records, for error messages.
        text: Captions without images.

    Raises:
        UserError: An image has no caption with a word, train has no images, no word occurs `min_count` times, no
            caption of the text is left, or the language does not split the captions into words.
    """
    split_words = make_tokenizer(params)
    numbers: dict[str, int] = {}  # of every distinct word
    captions = {group: _SplitWords() for group in GROUPS}
    held_out = HeldOutImages()
    num_without_words = num_unsegmented = 0

    def add(group: Group, image_id: int, tokenized: Iterable[Sequence[str]]) -> None:
        nonlocal num_unsegmented
        for words in tokenized:
            captions[group].numbers.extend([numbers.setdefault(word, len(numbers)) for word in words])
            captions[group].num_words.append(len(words))
            captions[group].image_id.append(image_id)
            line = " ".join(words)
            num_unsegmented += is_unsegmented(line)
            captions[group].text += (line + "\n").encode()

    for record in records:
        tokenized = [words for words in map(split_words, record.captions) if words]
        if not tokenized:
            raise UserError(
                f"{source}: image {record.image_id} ({record.file}) has no caption with a word: "
                f"{list(record.captions)}. Correct its captions, or remove the image."
            )
        num_without_words += len(record.captions) - len(tokenized)
        add(record.split, record.image_id, tokenized)
        if text and record.split != "train":
            held_out.add(record)
    kept = held_out.exclude_from(text)
    for words in map(split_words, (caption.text for caption in kept)):
        add("text", len(captions["text"].num_words), [words] if words else [])
    num_captions = sum(len(group.num_words) for group in captions.values())
    require_segmented(num_unsegmented, num_captions, params.language, str(source), "tokenize.language")
    if not captions["train"].num_words:
        raise empty_split_error(source, "train", "whose captions give the vocabulary")
    if text and not captions["text"].num_words:
        raise UserError(
            f"train.text: all of its {len(text)} captions are of images of val or test, or have no word. Use captions"
            " of other images."
        )
    train_counts, text_counts = (
        np.bincount(captions[group].numbers, minlength=len(numbers)) for group in ("train", "text")
    )
    counts = dict(zip(numbers, (train_counts + text_counts).tolist(), strict=True))
    vocabulary = Vocabulary.from_counts(counts, params.min_count, params.language)
    if len(vocabulary) == len(SPECIALS):
        raise UserError(
            f"{source}: no word occurs tokenize.min_count = {params.min_count} times. Lower tokenize.min_count."
        )
    ids = np.array(vocabulary.encode(numbers), dtype=np.int32)  # by number
    metrics: dict[str, int | float | None] = {
        "vocab_size": len(vocabulary),
        "num_captions_without_words": num_without_words,
    }
    for split in SPLITS:
        metrics |= _group_metrics(split, captions[split], ids, params.max_length)
    if text:
        metrics |= _group_metrics("text", captions["text"], ids, params.max_length)
        metrics["text_num_held_out"] = len(text) - len(kept)
        metrics["text_num_without_words"] = len(kept) - len(captions["text"].num_words)
    return TokenizedDataset(
        vocabulary=vocabulary,
        splits={split: _to_tokens(captions[split], ids, params.max_length) for split in SPLITS},
        text=_to_tokens(captions["text"], ids, params.max_length),
        metrics=metrics,
    )


def _to_tokens(captions: _SplitWords, ids: NDArray[np.int32], max_length: int) -> CaptionTokens:
    """Convert the captions of a split to token ids.

    Args:
        captions: The captions.
        ids: Token id of each word number.
        max_length: Maximum words of a caption.
    """
    num_words = np.array(captions.num_words, dtype=np.int64)  # [N]
    has_end = num_words <= max_length  # [N]
    offset = np.zeros(len(num_words) + 1, dtype=np.int64)  # [N + 1]
    np.cumsum(1 + np.minimum(num_words, max_length) + has_end, out=offset[1:])
    first, last = offset[:-1], offset[1:][has_end] - 1
    tokens = np.empty(offset[-1], dtype=np.int32)  # [M]
    is_word = np.ones(len(tokens), dtype=bool)  # [M]
    is_word[first] = is_word[last] = False
    position = np.arange(len(captions.numbers)) - np.repeat(np.cumsum(num_words) - num_words, num_words)  # [W]
    tokens[first], tokens[last] = START, END
    tokens[is_word] = ids[captions.numbers][position < max_length]
    image_id = np.array(captions.image_id, dtype=np.int64)  # [N]
    return CaptionTokens(ids=tokens, offset=offset, image_id=image_id, text=captions.text.decode())


def _group_metrics(
    group: Group, captions: _SplitWords, ids: NDArray[np.int32], max_length: int
) -> dict[str, int | float | None]:
    num_captions, num_words = len(captions.num_words), len(captions.numbers)
    num_unk = int((ids[captions.numbers] == UNK).sum())
    return {
        f"{group}_num_captions": num_captions,
        f"{group}_num_truncated": sum(length > max_length for length in captions.num_words),
        f"{group}_words_per_caption": round(num_words / num_captions, 3) if num_captions else None,
        f"{group}_unk_rate": round(num_unk / num_words, 6) if num_words else None,
    }


def write_tokens(path: Path, dataset: TokenizedDataset, params: TokenizeParams, fingerprint: str) -> None:
    """Write `tokens.h5`, with one group per split, and group `text`.

    Args:
        path: The file.
        dataset: The tokens of every split.
        params: The params of `tokenize` that gave `dataset`.
        fingerprint: Fingerprint of params and records, recorded as an attribute.
    """
    tokenization = describe_tokenizer(params)
    with create_artifact(path, SCHEMA) as file, defer_interrupts():
        file.attrs.update(
            {
                "fingerprint": fingerprint,
                "vocabulary_digest": dataset.vocabulary.digest,
                "vocab_size": len(dataset.vocabulary),
                "tokenizer": tokenization.source,
                "tokenizer_version": tokenization.version,
                "language": tokenization.language,
                "lowercase": tokenization.lowercase,
                "punctuation": tokenization.punctuation,
            }
        )
        for group in GROUPS:
            captions = dataset.text if group == "text" else dataset.splits[group]
            values = {
                "ids": captions.ids,
                "offset": captions.offset,
                "image_id": captions.image_id,
                "text": np.frombuffer(captions.text.encode(), dtype=np.uint8),
            }
            for name, (dtype, description) in _COLUMNS.items():
                column = file.create_dataset(f"{group}/{name}", data=values[name], dtype=dtype)
                column.attrs["description"] = description
        file.attrs["sha256"] = content_digest(file)


def read_tokens(path: Path, group: Group, skipped_ids: Set[int] = frozenset()) -> CaptionTokens:
    """Read one split of `tokens.h5`, or its captions without images.

    Args:
        path: The file.
        group: The group to read.
        skipped_ids: Images whose captions are left out.

    Raises:
        UserError: The file is missing, altered, or of another schema, or a value is out of bounds.
    """
    with open_artifact(path, SCHEMA, REMEDY) as file:
        _verify(path, file)
        columns = {name: read_dataset(file[group], name, dtype, [None]) for name, (dtype, _) in _COLUMNS.items()}
        captions = CaptionTokens(
            ids=columns["ids"],
            offset=columns["offset"],
            image_id=columns["image_id"],
            text=columns["text"].tobytes().decode(),
        )
        fault = _fault(captions, int(file.attrs["vocab_size"]))
    if fault is not None:
        raise UserError(f"{path}:{group}: {fault}. {REMEDY}")
    return captions.without_images(skipped_ids) if skipped_ids else captions


def _verify(path: Path, file: h5py.File) -> None:
    """Check that the contents of an open file match its attribute `sha256`."""
    if file.attrs["sha256"] != content_digest(file):
        raise UserError(f"{path}: the contents do not match the attribute sha256. {REMEDY}")


def _fault(captions: CaptionTokens, vocab_size: int) -> str | None:
    """Return what is wrong with the captions of a split, or None."""
    ids, offset, image_id, text = captions.ids, captions.offset, captions.image_id, captions.text
    num_captions = len(image_id)
    if len(offset) != num_captions + 1 or offset[0] != 0 or offset[-1] != len(ids) or (captions.length < 2).any():
        return f"offset does not divide the {len(ids)} ids among {num_captions} captions"
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        return f"ids are {ids.min()} to {ids.max()}, but the vocabulary has {vocab_size} words"
    if (ids[offset[:-1]] != START).any():
        return f"caption {np.argmax(ids[offset[:-1]] != START)} does not begin with <start>"
    if len(np.unique(image_id)) != len(captions.first_of_image):
        return "the captions of an image are not next to each other"
    if text.count("\n") != num_captions or "\n\n" in text or text[:1] == "\n" or text[-1:] not in ("", "\n"):
        return f"text does not have {num_captions} lines with words"
    return None


def require_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """Check that `tokens.h5` was written with a vocabulary.

    Args:
        path: The file.
        vocabulary: The expected vocabulary.

    Raises:
        UserError: The file cannot be read, or was written with another vocabulary.
    """
    with open_artifact(path, SCHEMA, REMEDY) as file:
        digest, vocab_size = file.attrs["vocabulary_digest"], file.attrs["vocab_size"]
    if digest != vocabulary.digest or vocab_size != len(vocabulary):
        raise UserError(
            f"{path}: was written with vocabulary {digest} of {vocab_size} words, but {VOCABULARY_FILE} has digest"
            f" {vocabulary.digest} and {len(vocabulary)} words. {REMEDY}"
        )


def read_tokenization(path: Path) -> Tokenization:
    """Read from `tokens.h5` how its captions were tokenized.

    Raises:
        UserError: The file is missing, damaged, or of another schema.
    """
    with open_artifact(path, SCHEMA, REMEDY) as file:
        _verify(path, file)
        return spacy_tokenization(
            language=file.attrs["language"],
            lowercase=bool(file.attrs["lowercase"]),
            punctuation=file.attrs["punctuation"],
            version=file.attrs["tokenizer_version"],
        )


def group_references(captions: CaptionTokens) -> dict[int, list[list[str]]]:
    """Group the captions of a split, as lists of words, by image id, in ascending order."""
    by_image: dict[int, list[list[str]]] = {}
    for image_id, caption in zip(captions.image_id.tolist(), captions.captions, strict=True):
        by_image.setdefault(image_id, []).append(caption.split(" "))
    return by_image
