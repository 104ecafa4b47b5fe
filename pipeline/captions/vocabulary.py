"""The vocabulary: the words that the decoder can generate, and their ids."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from pipeline.artifacts import Schema, fingerprint, read_json, write_json
from pipeline.errors import UserError

SCHEMA = Schema("gridcap.vocabulary", 1)
VOCABULARY_FILE = "vocabulary.json"
REMEDY = "Run `dvc repro -f -s tokenize`."
"""What to do about a missing or damaged output of `tokenize`."""
PAD, START, END, UNK = range(4)
SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")


class _VocabularyFile(TypedDict):
    digest: str
    words: list[Annotated[str, Field(min_length=1)]]


@dataclass(frozen=True)
class Vocabulary:
    """Words in the order of their ids, starting with the special tokens `<pad> <start> <end> <unk>`."""

    words: tuple[str, ...]
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.words[: len(SPECIALS)] != SPECIALS:
            raise ValueError(f"a vocabulary must start with {SPECIALS}, got {self.words[: len(SPECIALS)]}")
        if len(set(self.words)) != len(self.words):
            raise ValueError("a vocabulary must not contain duplicate words")
        object.__setattr__(self, "_ids", {word: index for index, word in enumerate(self.words)})

    @classmethod
    def build(cls, captions: Iterable[Sequence[str]], min_count: int) -> "Vocabulary":
        """Build a vocabulary of the words that occur at least `min_count` times.

        Args:
            captions: Captions as lists of words.
            min_count: Minimum occurrences of a word.

        Returns:
            The vocabulary, sorted by descending frequency, then by word.
        """
        return cls.from_counts(Counter(word for words in captions for word in words), min_count)

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], min_count: int) -> "Vocabulary":
        """Build a vocabulary as `build` does, from the number of occurrences of each word."""
        frequent = sorted((-count, word) for word, count in counts.items() if count >= min_count)
        return cls(SPECIALS + tuple(word for _, word in frequent if word not in SPECIALS))

    def __len__(self) -> int:
        return len(self.words)

    @property
    def digest(self) -> str:
        """Digest of the words and their order, 16 hexadecimal digits."""
        return fingerprint(words=self.words)

    def encode(self, words: Iterable[str]) -> list[int]:
        """Convert words to ids. Unknown words become `<unk>`. No `<start>` or `<end>` is added."""
        return [self._ids.get(word, UNK) for word in words]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Convert ids to words, up to the first `<end>`, without `<start>` and `<pad>`."""
        words = []
        for token_id in ids:
            if token_id == END:
                break
            if token_id not in (PAD, START):
                words.append(self.words[token_id])
        return words


def write_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """Write `vocabulary.json`; a word's id is its index in `words`."""
    write_json(path, {**SCHEMA.header, "digest": vocabulary.digest, "words": list(vocabulary.words)})


def read_vocabulary(path: Path, remedy: str = REMEDY) -> Vocabulary:
    """Read `vocabulary.json`.

    Args:
        path: The file.
        remedy: What the user should do about a missing or damaged file, as a sentence.

    Raises:
        UserError: The file is missing, malformed or of another schema, or its words do not match its digest.
    """
    document = read_json(path, _VocabularyFile, remedy, SCHEMA)
    try:
        vocabulary = Vocabulary(tuple(document["words"]))
    except ValueError as error:
        raise UserError(f"{path}: {error}. {remedy}") from error
    if vocabulary.digest != document["digest"]:
        raise UserError(f"{path}: the words do not match the digest {document['digest']}. {remedy}")
    return vocabulary
