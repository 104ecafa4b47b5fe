import pytest

from pipeline.captions.tokenization import Tokenization, installed_version, spacy_tokenization, spacy_version


@pytest.mark.parametrize(
    ("lowercase", "punctuation", "words", "fields"),
    [
        (True, "drop", "lowercased, punctuation dropped", {"case": "lower", "punct": "drop"}),
        (False, "keep", "original case, punctuation kept", {"case": "mixed", "punct": "keep"}),
    ],
)
def test_description_and_signature(lowercase: bool, punctuation: str, words: str, fields: dict[str, str]) -> None:
    tokenization = spacy_tokenization("de", lowercase, punctuation, "3.8.1")
    assert tokenization.description == f"spacy 3.8.1 (spacy.blank('de')), {words}"
    assert tokenization.signature == {"tok": "spacy-3.8.1", "lang": "de", **fields}


def test_the_version_includes_the_packages_of_the_language() -> None:
    assert spacy_version("zh") == installed_version("spacy")
    assert spacy_version("th") == f"{installed_version('spacy')}+pythainlp-{installed_version('pythainlp')}"


def test_the_signature_has_no_separator() -> None:
    tokenization = Tokenization(
        tokenizer="x", version="1", source="a|b", language="en", lowercase=True, punctuation="drop"
    )
    assert all("|" not in value for value in tokenization.signature.values())


def test_a_missing_package_has_the_version_missing() -> None:
    assert installed_version("no-such-package-of-gridcap") == "missing"
    assert installed_version("numpy")[0].isdigit()
