"""How captions were tokenized. Every score that depends on words is stored with this."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from pipeline.captions.languages import SEGMENTERS


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """A tokenizer and its settings."""

    tokenizer: str
    """Short name, such as `spacy`."""
    version: str
    """Version of the tokenizer's package."""
    source: str
    """Rules or program of the tokenizer, such as `spacy.blank('en')`."""
    language: str
    """Code of the language."""
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
            "lang": self.language,
            "case": "lower" if self.lowercase else "mixed",
            "punct": self.punctuation,
        }


def spacy_tokenization(language: str, lowercase: bool, punctuation: str, version: str) -> Tokenization:
    """Describe the tokenizer of `make_tokenizer`.

    Args:
        language: Code of the language.
        lowercase: Whether captions are lowercased.
        punctuation: `drop` or `keep`.
        version: As from `spacy_version`.
    """
    return Tokenization(
        tokenizer="spacy",
        version=version,
        source=f"spacy.blank('{language}')",
        language=language,
        lowercase=lowercase,
        punctuation=punctuation,
    )


def spacy_version(language: str) -> str:
    """Return the version of spaCy and of the packages that it needs for a language: `3.8.18+pythainlp-5.4.0`."""
    packages = [f"{package}-{installed_version(package)}" for package in SEGMENTERS.get(language, ())]
    return "+".join([installed_version("spacy"), *packages])


def installed_version(package: str) -> str:
    """Return the version of an installed package, or `missing`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
