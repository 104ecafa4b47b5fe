import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.captions.records import (
    SCHEMA,
    AnnotatedObject,
    Record,
    escapes_root,
    iter_records,
    read_records,
    write_records,
)
from pipeline.errors import UserError

TRAIN = Record(image_id=9, file="a/ä b.jpg", split="train", captions=("A dog, „so“.", "b"))
TEST = Record(
    image_id=2,
    file="c.png",
    split="test",
    captions=("c",),
    subset="held-out",
    objects=(AnnotatedObject(attributes={"shape": "cube"}, box=(0.1, 0.2, 0.3, 0.4)),),
)
ROW = {"image_id": 3, "file": "a.jpg", "split": "train", "captions": ["A dog ."]}


def write_index(folder: Path, **changes: Any) -> None:
    """Write the index of the `records.jsonl` in a folder, with some keys changed."""
    content = (folder / "records.jsonl").read_bytes()
    index = {"num_records": len(content.splitlines()), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "index.json").write_text(json.dumps({**SCHEMA.header, **index, **changes}))


def error_of(folder: Path) -> str:
    """Return the message of the error when the records in a folder are read."""
    with pytest.raises(UserError) as error:
        read_records(folder)
    message = str(error.value)
    assert message.endswith("Run `dvc repro -f -s prepare`.")
    return message


def test_round_trip_sorts_records_by_image_id(tmp_path: Path) -> None:
    write_records(tmp_path, [TRAIN, TEST])
    assert read_records(tmp_path) == [TEST, TRAIN]
    assert read_records(tmp_path, "train") == [TRAIN]
    assert read_records(tmp_path, "val") == []


def test_index_counts_and_digests_the_records(tmp_path: Path) -> None:
    write_records(tmp_path, [TRAIN, TEST])
    index = json.loads((tmp_path / "index.json").read_text())
    digest = hashlib.sha256((tmp_path / "records.jsonl").read_bytes()).hexdigest()
    assert index == {"schema": "gridcap.records", "schema_version": 1, "num_records": 2, "sha256": digest}


@pytest.mark.parametrize(("before", "after"), [("A dog", "A cat"), ("\n", "\n\n"), ('"held-out"', '"held_out"')])
def test_altered_records_are_an_error(tmp_path: Path, before: str, after: str) -> None:
    write_records(tmp_path, [TRAIN, TEST])
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text().replace(before, after))
    assert error_of(tmp_path).startswith(f"{path}")


def test_no_record_of_an_altered_file_is_read(tmp_path: Path) -> None:
    write_records(tmp_path, [TRAIN, TEST])
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text().replace("A dog", "A cat"))
    with pytest.raises(UserError, match=r"records\.jsonl: SHA-256 differs from index\.json"):
        next(iter_records(tmp_path))


def test_removed_records_are_an_error(tmp_path: Path) -> None:
    write_records(tmp_path, [TRAIN, TEST])
    write_index(tmp_path, num_records=3)
    assert "records.jsonl: has 2 records, but index.json has 3." in error_of(tmp_path)


def test_invalid_line_is_an_error_with_its_number(tmp_path: Path) -> None:
    write_records(tmp_path, [TRAIN, TEST])
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text().replace('"train"', '"training"'))
    message = error_of(tmp_path)
    assert message.startswith(f"{path}:2: ")
    assert "split: " in message
    assert "'train'" in message


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"image_id": -1}, "image_id: "),
        ({"image_id": 2**63}, "image_id: "),
        ({"file": "../a.jpg"}, "file: "),
        ({"file": "/etc/passwd"}, "file: "),
        ({"file": "a\0b"}, "file: "),
        ({"file": ""}, "file: "),
        ({"captions": []}, "captions: "),
        ({"captions": ["A dog .", " "]}, "captions.1: "),
        ({"objects": [{"attributes": {}, "box": [0, 0, 1, float("nan")]}]}, "objects.0.box.3: "),
        ({"objects": [{"attributes": {}, "box": [0, 0, 1, float("inf")]}]}, "objects.0.box.3: "),
    ],
)
def test_values_out_of_bounds_are_errors(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"image_id": 4} | changes) + "\n")
    write_index(tmp_path)
    assert f"{path}:2: not a valid record ({fault}" in error_of(tmp_path)


@pytest.mark.parametrize("second_id", [3, 2])
def test_image_ids_that_do_not_ascend_are_an_error(tmp_path: Path, second_id: int) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"image_id": second_id}) + "\n")
    write_index(tmp_path)
    assert f"{path}:2: image id {second_id} does not follow 3 of the line before." in error_of(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b'{"image_id": "\xe9"}',
        json.dumps(ROW).replace("dog", "\\ud800").encode(),
        b'{"image_id": ' + b"[" * 100_000,
        b"",
        b"null",
    ],
    ids=["not UTF-8", "surrogate", "nested", "empty", "null"],
)
def test_line_that_is_not_a_json_object_is_an_error(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "records.jsonl").write_bytes(line + b"\n")
    write_index(tmp_path)
    assert "records.jsonl:1: not a valid record" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["records.jsonl", "index.json"])
def test_missing_file_is_an_error_that_names_the_stage(tmp_path: Path, name: str) -> None:
    write_records(tmp_path, [TRAIN])
    (tmp_path / name).unlink()
    assert f"{tmp_path / name}: no such file. " in error_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.jpg", False), ("a/b..c/d.jpg", False), ("../a.jpg", True), ("a/../../b", True), ("/a", True), ("..", True)],
)
def test_escapes_root(name: str, expected: bool) -> None:
    assert escapes_root(name) is expected
