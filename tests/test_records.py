from pathlib import Path

import pytest

from pipeline.captions.records import AnnotatedObject, Record, read_records, write_records
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


def test_round_trip_sorts_records_by_image_id(tmp_path: Path) -> None:
    write_records(tmp_path, [TRAIN, TEST])
    assert read_records(tmp_path) == [TEST, TRAIN]
    assert read_records(tmp_path, "train") == [TRAIN]
    assert read_records(tmp_path, "val") == []


def test_invalid_line_is_an_error_with_its_number(tmp_path: Path) -> None:
    write_records(tmp_path, [TRAIN, TEST])
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text().replace('"train"', '"training"'))
    with pytest.raises(UserError) as error:
        read_records(tmp_path)
    message = str(error.value)
    assert f"{path}:2: " in message
    assert "split: " in message
    assert "'train'" in message
    assert "dvc repro -f -s prepare" in message


def test_line_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"image_id": "\xe9"}\n')
    with pytest.raises(UserError, match=r"records\.jsonl:1: "):
        read_records(tmp_path)


def test_missing_file_is_an_error_that_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"records\.jsonl: no such file\. .*prepare"):
        read_records(tmp_path)
