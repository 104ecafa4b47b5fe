"""How captions were tokenized. Every score that depends on words is stored with this."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """A tokenizer and its settings."""

    tokenizer: str
    """Short name, such as `spacy`."""
    version: str
    """Version of the tokenizer's package."""
    source: str
    """Rules or program of the tokenizer, such as `spacy.blank('en')`."""
    lowercase: bool
    """Whether captions were lowercased."""
    punctuation: str
    """`drop` or `keep`."""

    @property
    def description(self) -> str:
        """Description in one line."""
        case = "lowercased" if self.lowercase else "original case"
        punctuation = "dropped" if self.punctuation == "drop" else "kept"
        return f"{self.tokenizer} {self.version} ({self.source}), {case}, punctuation {punctuation}"

    @property
    def signature(self) -> dict[str, str]:
        """Fields of a score's signature, by name."""
        return {
            "tok": f"{self.tokenizer}-{self.version}",
            "case": "lower" if self.lowercase else "mixed",
            "punct": self.punctuation,
        }


def spacy_tokenization(lowercase: bool, punctuation: str, spacy_version: str) -> Tokenization:
    """Describe the tokenizer of `make_tokenizer`.

    Args:
        lowercase: Whether captions are lowercased.
        punctuation: `drop` or `keep`.
        spacy_version: Version of spaCy.
    """
    return Tokenization(
        tokenizer="spacy",
        version=spacy_version,
        source="spacy.blank('en')",
        lowercase=lowercase,
        punctuation=punctuation,
    )


def installed_version(package: str) -> str:
    """Return the version of an installed package, or `missing`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
