from pathlib import Path

import pytest

from pipeline.captions.records import Record, Thing, read_records, write_records
from pipeline.errors import UserError

TRAIN = Record(image_id=9, file="a/ä b.jpg", split="train", captions=("A dog, „so“.", "b"))
TEST = Record(
    image_id=2,
    file="c.png",
    split="test",
    captions=("c",),
    subset="held-out",
    things=(Thing(attributes={"shape": "cube"}, box=(0.1, 0.2, 0.3, 0.4)),),
)


def test_records_come_back_as_they_were_written_ordered_by_id(tmp_path: Path) -> None:
    write_records(tmp_path, [TRAIN, TEST])
    assert read_records(tmp_path) == [TEST, TRAIN]
    assert read_records(tmp_path, "train") == [TRAIN]
    assert read_records(tmp_path, "val") == []


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    write_records(tmp_path, [TRAIN, TEST])
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text().replace('"train"', '"training"'))
    with pytest.raises(UserError, match=r"records\.jsonl, line 2: is no record \(split: .*'train'"):
        read_records(tmp_path)


def test_a_missing_file_says_which_stage_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc repro prepare"):
        read_records(tmp_path)
