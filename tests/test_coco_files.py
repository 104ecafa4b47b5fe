"""COCO results and annotations: valid files, and errors with file and location."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.captions.records import Record, write_records
from pipeline.errors import UserError
from pipeline.evaluation.coco_files import References, read_references, read_results, select_scored

NO_REFERENCES = References(captions={})


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_results_are_read_by_image_id(tmp_path: Path) -> None:
    results = [{"image_id": 7, "caption": "a dog", "score": 0.5}, {"image_id": 3, "caption": ""}]
    path = write(tmp_path / "captions.json", results)
    assert read_results(path, NO_REFERENCES) == read_results(tmp_path, NO_REFERENCES) == {7: "a dog", 3: ""}


def test_references_are_read_from_annotations_and_from_records(tmp_path: Path) -> None:
    annotations = [
        {"id": 1, "image_id": 7, "caption": "a dog"},
        {"id": 2, "image_id": 9, "caption": "a cat"},
        {"id": 3, "image_id": 7, "caption": "dogs"},
    ]
    document = {"info": {}, "images": [{"id": 7}, {"id": 8}], "annotations": annotations}
    assert read_references(write(tmp_path / "a.json", document)).captions == {7: ["a dog", "dogs"], 8: [], 9: ["a cat"]}
    record = Record(image_id=4, file="4.jpg", split="test", captions=("a dog", "dogs"))
    write_records(tmp_path / "prepared", [record])
    assert read_references(tmp_path / "prepared").captions == {4: ["a dog", "dogs"]}


PREDICTIONS = """\
{"image": "photos/a.jpg", "caption": "a dog", "confidence": 0.5}

{"image": "b.jpg", "caption": ""}
"""


def test_predictions_are_matched_by_file_name(tmp_path: Path) -> None:
    path = write(tmp_path / "captions.jsonl", PREDICTIONS)
    images = [
        {"id": 7, "file_name": "train/a.jpg", "domain": "in-domain"},
        {"id": 8, "file_name": "b.jpg", "domain": "out-domain", "subset": "rare"},
        {"id": 9, "file_name": None, "domain": None},
    ]
    references = read_references(write(tmp_path / "a.json", {"images": images, "annotations": []}))
    assert references.subsets == {7: "in-domain", 8: "rare"}
    assert read_results(path, references) == {7: "a dog", 8: ""}
    with pytest.raises(UserError, match=r"captions\.jsonl: photos/a\.jpg: no images of the references have this file"):
        read_results(path, NO_REFERENCES)
    ambiguous = References(captions={}, files={1: "x/a.jpg", 2: "y/a.jpg"})
    with pytest.raises(UserError, match=r"photos/a\.jpg: 2 images of the references .*: ids 1, 2\."):
        read_results(path, ambiguous)
    write(path, PREDICTIONS + '{"image": "c/b.jpg", "caption": "a cat"}')
    with pytest.raises(UserError, match=r"captions\.jsonl: c/b\.jpg: second caption of image 8, after b\.jpg"):
        read_results(path, references)
    write(path, PREDICTIONS + '{"image": "c.jpg"}')
    with pytest.raises(UserError, match=r"captions\.jsonl:4: caption: "):
        read_results(path, references)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        pytest.param("[{]", ["Invalid JSON", "line 1 column 3"], id="not JSON"),
        pytest.param('[{"image_id": 1,\n "caption": "a" "b"}]', ["Invalid JSON", "line 2 column 17"], id="line 2"),
        pytest.param("[" * 100_000, ["Invalid JSON", "recursion"], id="nested too deeply"),
        pytest.param(
            f'[{{"image_id": {"9" * 5000}, "caption": "a"}}]', ["Invalid JSON", "out of range"], id="integer too long"
        ),
        pytest.param('[{"image_id": 1, "caption": "a \\ud83d dog"}]', ["Invalid JSON"], id="half a character"),
        pytest.param({"image_id": 1}, ["array", "results file"], id="not a list"),
        pytest.param([], ["no captions"], id="empty"),
        pytest.param(["a dog"], ["[0]", "object"], id="not an object"),
        pytest.param([{"caption": "a", "id": 3}], ["[0].image_id", "required"], id="no image id"),
        pytest.param([{"image_id": 1, "caption": "a"}, {"image_id": 2}], ["[1].caption", "required"], id="no caption"),
        pytest.param([{"image_id": "1a", "caption": "a"}], ["[0].image_id", "integer"], id="id is a string"),
        pytest.param([{"image_id": True, "caption": "a"}], ["[0].image_id", "integer"], id="id is a Boolean"),
        pytest.param([{"image_id": 1, "caption": None}], ["[0].caption", "string"], id="caption is null"),
        pytest.param(
            [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "a"}, {"image_id": 1, "caption": "b"}],
            ["[2]: second caption of image 1", "after [0]"],
            id="two captions of an image",
        ),
    ],
)
def test_invalid_results_are_rejected(tmp_path: Path, content: Any, facts: list[str]) -> None:
    path = write(tmp_path / "results.json", content)
    with pytest.raises(UserError) as error:
        read_results(path, NO_REFERENCES)
    assert str(error.value).startswith(f"{path}: ")
    assert [fact for fact in facts if fact not in str(error.value)] == []


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        pytest.param([], ["annotations file"], id="a list"),
        pytest.param({"annotations": {}}, ["annotations: ", "array"], id="annotations is no list"),
        pytest.param({"images": 3, "annotations": []}, ["images: ", "array"], id="images is no list"),
        pytest.param({"images": [{"id": 1}, {"id": "b"}], "annotations": []}, ["images[1].id", "integer"], id="id"),
        pytest.param(
            {"annotations": [{"image_id": 1, "caption": 2}]}, ["annotations[0].caption", "string"], id="caption"
        ),
    ],
)
def test_invalid_annotations_are_rejected(tmp_path: Path, content: Any, facts: list[str]) -> None:
    path = write(tmp_path / "annotations.json", content)
    with pytest.raises(UserError) as error:
        read_references(path)
    assert str(error.value).startswith(f"{path}: ")
    assert [fact for fact in facts if fact not in str(error.value)] == []


def test_missing_and_binary_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        read_results(tmp_path / "none.json", NO_REFERENCES)
    (tmp_path / "model.json").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match=r"model\.json: "):
        read_references(tmp_path / "model.json")


def test_a_byte_order_mark_and_surrogate_pairs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('[{"image_id": 1, "caption": "a \\ud83d\\udc15 dog"}]', encoding="utf-8-sig")
    assert read_results(path, NO_REFERENCES) == {1: "a 🐕 dog"}


def test_images_without_references_are_listed() -> None:
    results = dict.fromkeys(range(8), "a dog")
    paths = Path("r.json"), Path("a.json")
    with pytest.raises(UserError, match=r"^r\.json: .*a\.json \(7\): 1, 2, 3, 4, 5, \.\.\."):
        select_scored(results, References(captions={0: ["a"]}), *paths)
    without_caption = References(captions={image_id: ["a"] * (image_id != 6) for image_id in range(9)})
    with pytest.raises(UserError, match=r"^a\.json: .*r\.json .*\(1\): 6\."):
        select_scored(results, without_caption, *paths)
    references = References(captions={image_id: ["a"] for image_id in range(9)})
    assert select_scored(results, references, *paths) == results


def test_ids_may_be_digits_in_quotes(tmp_path: Path) -> None:
    results = [{"image_id": "37777", "caption": "a dog"}]
    assert read_results(write(tmp_path / "results.json", results), NO_REFERENCES) == {37777: "a dog"}
    document = {"images": [{"id": "37777"}, {"id": "8"}], "annotations": results}
    assert read_references(write(tmp_path / "a.json", document)).captions == {37777: ["a dog"], 8: []}


def test_compressed_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json.gz"
    content = gzip.compress(b'[{"image_id": 1, "caption": "a dog"}]')
    path.write_bytes(content)
    assert read_results(path, NO_REFERENCES) == {1: "a dog"}
    for damaged in (content[:-9], b"[]", content[:12] + b"\xff" * 9 + content[21:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"results\.json\.gz: not a complete gzip file"):
            read_results(path, NO_REFERENCES)


def test_precanned_and_rejected_references_are_left_out(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 1, "caption": "a can", "is_precanned": False, "is_rejected": False},
        {"image_id": 1, "caption": "quality issues", "is_precanned": True, "is_rejected": False},
        {"image_id": 2, "caption": "asdf", "is_precanned": False, "is_rejected": True},
    ]
    references = read_references(write(tmp_path / "a.json", {"annotations": annotations, "images": [{"id": 2}]}))
    assert references == References(captions={1: ["a can"]}, num_left_out=2, unscored_images=frozenset({2}))
    paths = Path("r.json"), Path("a.json")
    assert select_scored({1: "a can", 2: "a dog"}, references, *paths) == {1: "a can"}
    with pytest.raises(UserError, match=r"^a\.json: .*precanned"):
        select_scored({2: "a dog"}, references, *paths)
