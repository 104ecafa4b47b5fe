"""Files of captions from anywhere: what is read, and what is refused with file and place."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.captions.records import Record, write_records
from pipeline.errors import UserError
from pipeline.evaluation.coco_files import check_known, read_references, read_results


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_results_are_read_by_image_id(tmp_path: Path) -> None:
    results = [{"image_id": 7, "caption": "a dog", "score": 0.5}, {"image_id": 3, "caption": ""}]
    path = write(tmp_path / "captions.json", results)
    assert read_results(path) == read_results(tmp_path) == {7: "a dog", 3: ""}


def test_references_are_read_from_annotations_and_from_records(tmp_path: Path) -> None:
    annotations = [
        {"id": 1, "image_id": 7, "caption": "a dog"},
        {"id": 2, "image_id": 9, "caption": "a cat"},
        {"id": 3, "image_id": 7, "caption": "dogs"},
    ]
    document = {"info": {}, "images": [{"id": 7}, {"id": 8}], "annotations": annotations}
    assert read_references(write(tmp_path / "a.json", document)) == {7: ["a dog", "dogs"], 8: [], 9: ["a cat"]}
    record = Record(image_id=4, file="4.jpg", split="test", captions=("a dog", "dogs"))
    write_records(tmp_path / "prepared", [record])
    assert read_references(tmp_path / "prepared") == {4: ["a dog", "dogs"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", "line 1, column 3: is no JSON"),
        ('[{"image_id": 1,\n "caption": "a" "b"}]', "line 2, column 17: is no JSON"),
        ("[" * 100_000, "cannot be read as captions .*recursion"),
        (f'[{{"image_id": {"9" * 5000}, "caption": "a"}}]', "cannot be read as captions .*digits"),
        ('[{"image_id": 1, "caption": "a \\ud83d dog"}]', r'entry 0: caption has half a character, "a \\ud83d dog"'),
        ({"image_id": 1}, 'must hold a list of results, .*, got {"image_id": 1}'),
        ([], "holds no captions"),
        (["a dog"], 'entry 0: must be a mapping with "image_id" and "caption", got "a dog"'),
        ([{"caption": "a", "id": 3}], 'entry 0: lacks "image_id"; it has caption, id'),
        ([{"image_id": 1, "caption": "a"}, {"image_id": 2}], 'entry 1: lacks "caption"; it has image_id'),
        ([{"image_id": "1", "caption": "a"}], 'entry 0: image_id must be a whole number, got "1"'),
        ([{"image_id": True, "caption": "a"}], "entry 0: image_id must be a whole number, got true"),
        ([{"image_id": 1, "caption": None}], "entry 0: caption must be text, got null"),
        ([{"image_id": 1, "caption": ["a"] * 40}], r"caption must be text, got \[.* \.\.\.$"),
        (
            [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "a"}, {"image_id": 1, "caption": "b"}],
            "entry 2: is a second caption of image 1, after entry 0; keep one",
        ),
    ],
)
def test_faulty_results_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "results.json", content)
    with pytest.raises(UserError, match=rf"^{path}.*{message}"):
        read_results(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"must hold COCO annotations, .*, got \[\]"),
        ({"annotations": {}}, "must hold COCO annotations"),
        ({"images": 3, "annotations": []}, '"images" must be a list, got 3'),
        ({"images": [{"id": 1}, {"id": "2"}], "annotations": []}, 'image 1: .* whole number as "id", got {"id": "2"}'),
        ({"annotations": [{"image_id": 1, "caption": 2}]}, "annotation 0: caption must be text, got 2"),
    ],
)
def test_faulty_annotations_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "annotations.json", content)
    with pytest.raises(UserError, match=rf"^{path}.*{message}"):
        read_references(path)


def test_absent_files_and_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: no such file; name"):
        read_results(tmp_path / "none.json")
    (tmp_path / "model.json").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match=r"model\.json: is no UTF-8 text at byte 0"):
        read_references(tmp_path / "model.json")


def test_a_byte_order_mark_and_whole_characters_beyond_16_bits_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('[{"image_id": 1, "caption": "a \\ud83d\\udc15 dog"}]', encoding="utf-8-sig")
    assert read_results(path) == {1: "a 🐕 dog"}


def test_images_without_references_are_named() -> None:
    results = dict.fromkeys(range(8), "a dog")
    with pytest.raises(UserError, match=r"r\.json: captions 7 images that a\.json lacks, such as 1, 2, 3, 4, 5;"):
        check_known(results, {0: ["a"]}, Path("r.json"), Path("a.json"))
    with pytest.raises(UserError, match=r"a\.json: has no caption of 1 images that r\.json captions, such as 6;"):
        check_known(results, {one: ["a"] * (one != 6) for one in range(9)}, Path("r.json"), Path("a.json"))
    check_known(results, {one: ["a"] for one in range(9)}, Path("r.json"), Path("a.json"))
