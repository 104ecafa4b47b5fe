"""The vocabulary: which words the decoder knows, and their ids."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.artifacts import fingerprint, write_json
from pipeline.errors import UserError

SCHEMA = "gridcap.vocabulary"
SCHEMA_VERSION = 1
_MEND = "run `dvc repro -f -s tokenize`"
PAD, START, END, UNK = range(4)
SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")


@dataclass(frozen=True)
class Vocabulary:
    """Words in the order of their ids; the first four are the specials `<pad> <start> <end> <unk>`."""

    words: tuple[str, ...]
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.words[: len(SPECIALS)] != SPECIALS:
            raise ValueError(f"a vocabulary must begin with {SPECIALS}, got {self.words[: len(SPECIALS)]}")
        if len(set(self.words)) != len(self.words):
            raise ValueError("a vocabulary must hold no word twice")
        object.__setattr__(self, "_ids", {word: number for number, word in enumerate(self.words)})

    @classmethod
    def build(cls, captions: Iterable[Sequence[str]], min_count: int) -> "Vocabulary":
        """Take the words that occur at least `min_count` times, the frequent first, equals by alphabet."""
        counts = Counter(word for words in captions for word in words)
        known = sorted((-count, word) for word, count in counts.items() if count >= min_count)
        return cls(SPECIALS + tuple(word for _, word in known if word not in SPECIALS))

    def __len__(self) -> int:
        return len(self.words)

    @property
    def digest(self) -> str:
        """Names the words and their order, in 16 hexadecimal digits."""
        return fingerprint(words=self.words)

    def encode(self, words: Iterable[str]) -> list[int]:
        """Ids of words; a word that is not known gets the id of `<unk>`. Adds neither start nor end."""
        return [self._ids.get(word, UNK) for word in words]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Words of ids up to the first `<end>`, without `<start>` and `<pad>`."""
        words = []
        for number in ids:
            if number == END:
                break
            if number not in (PAD, START):
                words.append(self.words[number])
        return words


def write_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """Write `vocabulary.json`; a word's id is its position in `words`."""
    document = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "digest": vocabulary.digest,
        "words": list(vocabulary.words),
    }
    write_json(path, document)


def read_vocabulary(path: Path, mend: str | None = None) -> Vocabulary:
    """Read `vocabulary.json`.

    Raises `UserError`, naming the file, where it is missing, in another form, or altered since it was written. `mend`
    is what helps against the first two where `tokenize` cannot.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = (document["schema"], document["schema_version"])
        vocabulary = Vocabulary(tuple(document["words"]))
        digest = document["digest"]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {mend or 'run `dvc repro tokenize`'}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {mend or _MEND}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no vocabulary ({error}); {mend or _MEND}") from error
    if found != (SCHEMA, SCHEMA_VERSION):
        raise UserError(f"{path}: has schema {found[0]} {found[1]}, this version reads {SCHEMA} {SCHEMA_VERSION}")
    if vocabulary.digest != digest:
        raise UserError(f"{path}: its words do not match its digest {digest}; restore the file")
    return vocabulary
