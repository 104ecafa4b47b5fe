"""docs/artifacts.md documents what the stages write."""

import json
import re
from dataclasses import fields
from pathlib import Path

import h5py
import pytest

from pipeline.captions.records import SCHEMA, AnnotatedObject, Record, write_records
from pipeline.captions.sources.dataset import PreparedCounts
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.captions.tokens import TokenizedDataset, tokenize, write_tokens
from pipeline.captions.vocabulary import write_vocabulary
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "artifacts.md").read_text()
RECORDS = [
    Record(
        image_id=index,
        file=f"{index}.png",
        split=split,
        captions=("A red cube .",),
        objects=(AnnotatedObject(attributes={"shape": "cube"}, box=(0.1, 0.2, 0.3, 0.4)),),
    )
    for index, split in enumerate(("train", "val", "test"))
]
PARAMS = TokenizeParams(language="en", lowercase=True, punctuation="drop", min_count=1, max_length=9)


def section(title: str) -> str:
    """Text below a heading of the page, up to the next."""
    return PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def documented(text: str) -> set[str]:
    """Everything in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


@pytest.fixture
def dataset() -> TokenizedDataset:
    return tokenize(RECORDS, PARAMS, Path("records.jsonl"))


def test_keys_of_records_are_documented(tmp_path: Path) -> None:
    write_records(tmp_path, RECORDS)
    record = json.loads((tmp_path / "records.jsonl").read_text().splitlines()[0])
    index = json.loads((tmp_path / "index.json").read_text())
    keys = {*record, *(f"objects[].{key}" for key in record["objects"][0]), *(index.keys() - SCHEMA.header)}
    assert keys <= documented(section("`data/prepared`"))


def test_keys_of_the_vocabulary_are_documented(tmp_path: Path, dataset: TokenizedDataset) -> None:
    write_vocabulary(tmp_path / "vocabulary.json", dataset.vocabulary)
    keys = json.loads((tmp_path / "vocabulary.json").read_text()).keys()
    assert keys <= documented(section("`data/tokens`"))


def test_datasets_and_attributes_of_tokens_are_documented_with_their_types(
    tmp_path: Path, dataset: TokenizedDataset
) -> None:
    text = section("`data/tokens`")
    write_tokens(tmp_path / "tokens.h5", dataset, PARAMS, "0123")
    with h5py.File(tmp_path / "tokens.h5") as file:
        assert set(file.attrs) <= documented(text)
        rows = set(re.findall(r"(?m)^\| `(\w+)` \| (\w+) \| ([^|]+) \|", text))
        num_captions = len(file["train/image_id"])
        shapes = {
            num_captions: "N",
            num_captions + 1: "N + 1",
            len(file["train/ids"]): "M",
            len(file["train/text"]): "L",
        }
        for name, values in file["train"].items():
            assert (name, str(values.dtype), shapes[len(values)]) in rows


def test_metrics_of_prepare_and_tokenize_are_documented(dataset: TokenizedDataset) -> None:
    text = documented(section("`results`"))
    assert {
        field.removeprefix("train_") for field in dataset.metrics if not field.startswith(("val_", "test_"))
    } <= text
    assert {field.name for field in fields(PreparedCounts)} <= text
