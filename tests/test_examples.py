from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from pipeline.captions.records import AnnotatedObject, Record
from pipeline.evaluation.evaluate import ReportParams
from pipeline.metrics.caption_scores import compute_metrics
from pipeline.metrics.corpus import Corpus
from pipeline.metrics.tokenizers import SPACY
from pipeline.report.examples import MAX_SIDE, Example, build_examples, select_images
from tests.evaluation_data import GRID, make_data


def test_the_best_the_worst_and_random_images_are_selected_once():
    quality = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.9, 5: 0.3, 6: 0.2}
    params = ReportParams(best=2, worst=2, random=2)
    selection = select_images(quality, params, seed=1)
    assert selection[:4] == [("best", 2), ("best", 4), ("worst", 3), ("worst", 6)]
    assert {image_id for group, image_id in selection if group == "random"} == {1, 5}
    assert select_images(quality, params, seed=1) == selection


def test_too_few_images_are_selected_once():
    params = ReportParams(best=2, worst=2, random=2)
    assert select_images({1: 0.5, 2: 0.9, 3: 0.1}, params, seed=1) == [("best", 2), ("best", 1), ("worst", 3)]


def test_seeds_select_different_random_images():
    params = ReportParams(best=0, worst=0, random=3)
    selections = {tuple(select_images(dict.fromkeys(range(50), 0.0), params, seed)) for seed in range(5)}
    assert len(selections) == 5


def build_example(folder: Path, *objects: AnnotatedObject, view: str = "whole") -> Example:
    """Build the example of the image a.png in the folder, with the generated caption "a cube"."""
    record = Record(image_id=3, file="a.png", split="test", captions=("A cube.",), objects=objects)
    corpus = Corpus(image_ids=(3,), hypotheses=(["a", "cube"],), references=([["a", "ball"]],), tokenization=SPACY)
    metrics = compute_metrics(corpus, with_meteor=False, with_spice=False)
    data = make_data(folder, folder, [record], "a cube", view)
    (example,) = build_examples(data, metrics, ReportParams(best=0, worst=1, random=1), seed=1)
    return example


def test_an_example_has_its_caption_scores_and_boxes(tmp_path: Path) -> None:
    Image.new("RGB", (60, 30), "red").save(tmp_path / "a.png")
    box = (0.1, 0.2, 0.3, 0.4)
    example = build_example(tmp_path, AnnotatedObject(attributes={"shape": "cube", "color": "red"}, box=box))
    assert (example.group, example.image_id, example.words) == ("worst", 3, ("a", "cube"))
    assert example.references == ("A cube.",)
    assert example.scores == {"ROUGE-L": pytest.approx(0.5)}  # CIDEr is not defined for one image
    assert example.attention.shape == (2, *GRID)
    assert example.boxes == {1: (box,)}


def test_an_image_is_upright_in_its_aspect_ratio(tmp_path: Path) -> None:
    # The lower half is blue when upright; the file stores the image rotated.
    upright = Image.new("RGB", (600, 900), "white")
    upright.paste("blue", (0, 450, 600, 900))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    image = build_example(tmp_path).image
    assert image.shape == (MAX_SIDE, round(MAX_SIDE * 2 / 3), 3)
    assert image[50, 50].tolist() == [255, 255, 255]
    assert image[-50, 50].tolist() == [0, 0, 255]


def test_a_small_image_is_not_enlarged(tmp_path: Path) -> None:
    Image.new("RGB", (60, 30), "red").save(tmp_path / "a.png")
    assert build_example(tmp_path).image.shape == (30, 60, 3)


def test_the_captioned_view_is_shown(tmp_path: Path) -> None:
    halves = Image.new("RGB", (400, 200), "white")
    halves.paste("blue", (200, 0, 400, 200))
    halves.save(tmp_path / "a.png")
    image = build_example(tmp_path, view="whole_flipped").image
    assert image.shape == (200, 400, 3)
    assert image[100, 50].tolist() == [0, 0, 255]
    assert np.ptp(image[100, 50:150], axis=0).max() == 0
