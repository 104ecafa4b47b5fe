import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.captions.records import AnnotatedObject
from pipeline.captions.sources.coco import parse
from pipeline.captions.sources.parsed_file import SourceCaption
from pipeline.errors import UserError
from tests.dataset_files import write_coco

IMAGE = {"id": 1, "file_name": "1.jpg"}
CAPTION = {"id": 0, "image_id": 1, "caption": "A dog."}


def test_images_get_their_captions_and_subset(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    write_coco(
        path, [IMAGE, {"id": 3, "file_name": "3.jpg", "subset": "seen"}], [(3, " A cube. \n"), (3, "Ein Würfel.")]
    )
    first, second = parse(path, "train").images
    assert (first.image_id, first.file, first.split, first.captions) == (1, "train/1.jpg", None, ())
    assert (second.subset, first.subset) == ("seen", None)
    assert second.captions == (
        SourceCaption(" A cube. \n", f"{path}: annotation 0"),
        SourceCaption("Ein Würfel.", f"{path}: annotation 1"),
    )


def test_boxes_become_fractions_of_the_image(tmp_path: Path) -> None:
    cube = {"attributes": {"shape": "cube"}, "box": [10, 20, 50, 40.0]}
    path = tmp_path / "captions.json"
    write_coco(path, [IMAGE | {"width": 100, "height": 80, "objects": [cube]}], [(1, "A cube.")])
    (image,) = parse(path, ".").images
    assert image.objects == (AnnotatedObject(attributes={"shape": "cube"}, box=(0.1, 0.25, 0.5, 0.5)),)


def test_captions_of_images_that_the_file_does_not_list_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    write_coco(path, [IMAGE], [(1, "A dog."), (5, "A cat.")])
    assert parse(path, ".").unmatched_captions == [f"{path}: annotation 1 (image 5)"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "Invalid JSON"),
        ("[]", "Input should be"),
        ({"images": [IMAGE]}, "annotations: Field required"),
        ({"images": [IMAGE], "annotations": [{"id": 0, "image_id": 1}]}, "no annotation has a caption"),
        ({"images": [{"id": "1a", "file_name": "1.jpg"}], "annotations": []}, "images[0].id: Input should be"),
        ({"images": [{"id": "9" * 19, "file_name": "1.jpg"}], "annotations": []}, "images[0].id: Input should be"),
        (
            {"images": [IMAGE | {"objects": [{"attributes": {}, "box": [0, 0, 1, 1]}]}], "annotations": [CAPTION]},
            "image 1: has boxes, but its size is 0 x 0",
        ),
        (
            {"images": [IMAGE | {"objects": [{"attributes": {}, "box": [0, 0, 1, math.inf]}]}], "annotations": []},
            "images[0].objects[0].box[3]: Input should be a finite number",
        ),
    ],
)
def test_malformed_file_is_an_error(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as error:
        parse(path, ".")
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def write_document(path: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_ids_may_be_digits_in_quotes_and_annotation_ids_may_be_absent(tmp_path: Path) -> None:
    annotations = [{"image_id": "37777", "caption": "A kitchen."}, {"image_id": 5, "caption": "A cat."}]
    path = write_document(tmp_path / "c.json", [{"id": "000037777", "file_name": "a.jpg"}], annotations)
    parsed = parse(path, ".")
    assert [(image.image_id, image.captions) for image in parsed.images] == [
        (37777, (("A kitchen.", f"{path}: annotation [0]"),))
    ]
    assert parsed.unmatched_captions == [f"{path}: annotation [1] (image 5)"]


def test_ids_may_have_a_decimal_point_and_sizes_may_be_null(tmp_path: Path) -> None:
    images = [{"id": 7.0, "file_name": "a.jpg", "width": None, "height": None}]
    annotations = [{"image_id": 7, "caption": "A cat."}, {"image_id": 7.0, "caption": "A dog."}]
    (image,) = parse(write_document(tmp_path / "c.json", images, annotations), ".").images
    assert (image.image_id, [caption.text for caption in image.captions]) == (7, ["A cat.", "A dog."])
    images[0]["id"] = 7.5
    with pytest.raises(UserError, match=r"images\[0\]\.id: Input should be a valid integer"):
        parse(write_document(tmp_path / "c.json", images, annotations), ".")


def test_missing_captions_are_empty(tmp_path: Path) -> None:
    annotations = [CAPTION, {"id": 1, "image_id": 1, "caption": None}, {"id": 2, "image_id": 1}]
    (image,) = parse(write_document(tmp_path / "c.json", [IMAGE], annotations), ".").images
    assert [caption.text for caption in image.captions] == ["A dog.", "", ""]


def test_precanned_and_rejected_captions_are_left_out_and_counted(tmp_path: Path) -> None:
    marks = [(False, False), (True, False), (False, True), (True, True)]
    annotations = [
        {"id": i, "image_id": 1, "caption": f"Caption {i}.", "is_precanned": precanned, "is_rejected": rejected}
        for i, (precanned, rejected) in enumerate(marks)
    ]
    (image,) = parse(write_document(tmp_path / "c.json", [IMAGE], annotations), ".").images
    assert [caption.text for caption in image.captions] == ["Caption 0."]
    assert (image.num_precanned_captions, image.num_rejected_captions) == (2, 1)


def test_domain_is_the_subset_unless_there_is_a_subset(tmp_path: Path) -> None:
    domains = [{"domain": "near-domain"}, {"domain": "near-domain", "subset": "seen"}, {}]
    images = [{"id": i, "file_name": f"{i}.jpg"} | domain for i, domain in enumerate(domains)]
    parsed = parse(write_document(tmp_path / "c.json", images, []), ".")
    assert [image.subset for image in parsed.images] == ["near-domain", "seen", None]
