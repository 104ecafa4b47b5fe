import json
from pathlib import Path

import pytest

from pipeline.captions.sources.karpathy import parse
from pipeline.errors import UserError


def test_restval_becomes_train_and_cocoid_the_image_id(tmp_path: Path) -> None:
    images = [
        {"filename": "x.jpg", "filepath": "val2014", "split": "restval", "cocoid": 9, "imgid": 0},
        {"filename": "2_000000000f.jpg", "split": "val", "imgid": 1},
        {"filename": "3_000000000f.jpg", "split": "test", "imgid": 2},
    ]
    for image in images:
        image["sentences"] = [{"raw": "A dog.", "tokens": ["a", "dog"]}]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    parsed = parse(path, ".")
    assert [(image.file, image.image_id, image.split) for image in parsed.images] == [
        ("val2014/x.jpg", 9, "train"),
        ("2_000000000f.jpg", 2, "val"),
        ("3_000000000f.jpg", 3, "test"),
    ]
    assert parsed.images[1].captions == (("A dog.", f"{path}: images[1].sentences[0]"),)
    assert parsed.unmatched_captions == []


def test_unknown_split_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"images": [{"filename": "a.jpg", "split": "dev", "sentences": []}]}))
    with pytest.raises(UserError) as error:
        parse(path, ".")
    assert str(error.value).startswith(f"{path}: images[0].split: ")
    assert "'restval'" in str(error.value)


def test_missing_sentence_is_an_empty_caption(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    sentences = [{"raw": None}, {}, {"raw": "A dog."}]
    path.write_text(json.dumps({"images": [{"filename": "a.jpg", "split": "val", "sentences": sentences}]}))
    (image,) = parse(path, ".").images
    assert [caption.text for caption in image.captions] == ["", "", "A dog."]
