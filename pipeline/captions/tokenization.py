"""How captions were tokenized: stored beside every score that is computed on the words."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """A tokenizer and its settings."""

    tokenizer: str
    """Short name, such as `spacy`."""
    version: str
    source: str
    """The rules or the program behind the name, for readers."""
    lowercase: bool
    punctuation: str
    """`drop` or `keep`."""

    @property
    def description(self) -> str:
        """One line for readers."""
        case = "lowercased" if self.lowercase else "original case"
        punctuation = "dropped" if self.punctuation == "drop" else "kept"
        return f"{self.tokenizer} {self.version} ({self.source}), {case}, punctuation {punctuation}"

    @property
    def signature(self) -> dict[str, str]:
        """Fields of a score's signature."""
        return {
            "tok": f"{self.tokenizer}-{self.version}",
            "case": "lower" if self.lowercase else "mixed",
            "punct": self.punctuation,
        }


def spacy_tokenization(lowercase: bool, punctuation: str, spacy_version: str) -> Tokenization:
    """Describe the tokenizer of `make_tokenizer`."""
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
