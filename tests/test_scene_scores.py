from typing import Any

import numpy as np
import pytest

from pipeline.captions.records import AnnotatedObject, Record
from pipeline.evaluation.scene_scores import GroundedWord, find_grounded_words, score_scenes
from pipeline.generation.caption_io import GeneratedCaptions
from pipeline.metrics.bootstrap import Resampling
from tests.evaluation_data import make_caption

RESAMPLING = Resampling(bootstrap_samples=100, seed=0)
# A grid of 2 x 4 regions. The cube covers the left half of the upper row, the ball the last region of the lower row.
GRID = (2, 4)
CUBE, BALL = (0.0, 0.0, 0.5, 0.5), (0.75, 0.5, 0.25, 0.5)
OBJECTS = (
    AnnotatedObject(attributes={"shape": "cube", "color": "red", "size": "large", "texture": "matte"}, box=CUBE),
    AnnotatedObject(attributes={"shape": "sphere", "color": "blue", "size": "small", "texture": "shiny"}, box=BALL),
)
CAPTION = "a red cube stands to the left of a shiny ball"
# Attention of some words, [2, 4]; that of the other words is uniform.
ATTENTION = {
    "red": [[0.5, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]],  # the first of two equal peaks is in the cube
    "cube": [[0.1, 0.1, 0.0, 0.0], [0.8, 0.0, 0.0, 0.0]],  # below the cube
    "left": [[0.2, 0.0, 0.3, 0.0], [0.0, 0.0, 0.1, 0.4]],  # the ball, and part of the cube
    "shiny": [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]],
    "ball": [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.7, 0.3]],
}


def record(image_id: int, *objects: AnnotatedObject, subset: str | None = None) -> Record:
    return Record(image_id=image_id, file="a.png", split="test", captions=("A.",), subset=subset, objects=objects)


def generated(image_id: int, text: str) -> GeneratedCaptions:
    words = tuple(text.split())
    attention = np.array([ATTENTION.get(word, np.full(GRID, 1 / 8)) for word in words], np.float16)
    return GeneratedCaptions(image_id=image_id, captions=(make_caption(words, attention),))


def score(text: str, *objects: AnnotatedObject) -> dict[str, Any]:
    return score_scenes([record(1, *objects)], {1: generated(1, text)}, RESAMPLING)


def attention_scores(
    num_words: int, peak_in_box: float, peak_by_chance: float, mass_in_box: float, mass_by_chance: float
) -> Any:
    scores = {
        "peak_in_box": peak_in_box,
        "peak_by_chance": peak_by_chance,
        "mass_in_box": mass_in_box,
        "mass_by_chance": mass_by_chance,
    }
    return {"num_words": num_words, **{name: pytest.approx(value, abs=1e-3) for name, value in scores.items()}}


def change(trained: float, refined: float, interval: list[float] | None) -> dict[str, Any]:
    return {
        "trained": trained,
        "refined": refined,
        "difference": refined - trained,
        "interval": interval,
        "significant": False,
    }


def test_attention_scores_by_kind_of_word_worked_by_hand():
    assert score(CAPTION, *OBJECTS)["attention"] == {
        "color": attention_scores(1, 1.0, 2 / 8, 0.5, 1 / 4),
        "shape": attention_scores(2, 0.0, (2 / 8 + 1 / 8) / 2, (0.2 + 0.3) / 2, (1 / 4 + 1 / 8) / 2),
        "texture": attention_scores(1, 1.0, 1 / 8, 1.0, 1 / 8),
        "relation": attention_scores(1, 1.0, 3 / 8, 0.6, 3 / 8),
        # Without relations.
        "all": attention_scores(
            4, 2 / 4, (2 + 2 + 1 + 1) / 8 / 4, (0.5 + 0.2 + 0.3 + 1.0) / 4, (2 + 2 + 1 + 1) / 8 / 4
        ),
    }


def test_uniform_attention_scores_as_chance():
    scores = score("a blue sphere", *OBJECTS)["attention"]["all"]
    assert scores["mass_in_box"] == scores["mass_by_chance"] == 0.125


@pytest.mark.parametrize(
    ("text", "names", "relations"),
    [
        (CAPTION, 1.0, (1, 1.0)),
        ("a red cube stands to the right of a shiny ball", 1.0, (1, 0.0)),
        ("a green cube", 0.0, (0, None)),
        ("two balls", 0.0, (0, None)),
        ("nothing", None, (0, None)),
    ],
)
def test_accuracy_of_names_and_relations(text, names, relations):
    scores = score(text, *OBJECTS)
    assert scores["names"] == {"num_captions_without_names": int(names is None), "accuracy": names}
    assert (scores["relations"]["num_relations"], scores["relations"]["accuracy"]) == relations


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("a green ring stands to the left of a yellow cone", {}),  # neither object is in the image
        ("a red cube stands to the left of a green ring", {1: "color", 2: "shape"}),  # only one of the two objects is
        ("a red cube stands on the left of the picture", {1: "color", 2: "shape"}),
        (
            "a red cube and a ball are in front of a cube",
            {1: "color", 2: "shape", 5: "shape", 8: "relation", 11: "shape"},
        ),
        ("a ball behind a large cube", {1: "shape", 2: "relation", 4: "size", 5: "shape"}),
        ("a cube between a ball and a ball", {1: "shape", 2: "relation", 4: "shape", 7: "shape"}),
    ],
)
def test_words_that_refer_to_objects_in_the_image(text, kinds):
    assert {word.position: word.kind for word in find_grounded_words(text.split(), OBJECTS)} == kinds


def test_a_relation_refers_to_the_objects_on_both_sides():
    second_cube = AnnotatedObject(attributes=OBJECTS[0].attributes, box=(0.5, 0.0, 0.25, 0.5))
    words = find_grounded_words(["two", "red", "cubes", "stand", "behind", "a", "ball"], (*OBJECTS, second_cube))
    assert words[-1] == GroundedWord(position=4, kind="relation", boxes=(CUBE, BALL, second_cube.box))
    assert words[0].boxes == words[1].boxes == (CUBE, second_cube.box)


def test_subsets_are_scored_and_images_without_objects_are_left_out():
    records = [record(1, *OBJECTS, subset="seen"), record(2, *OBJECTS, subset="held-out"), record(3)]
    captions = {1: generated(1, "a shiny"), 2: generated(2, "a shiny ball"), 3: generated(3, "a cube")}
    scores = score_scenes(records, captions, RESAMPLING)
    assert (scores["num_images"], scores["subsets"]["seen"]["num_images"]) == (2, 1)
    assert scores["attention"]["all"]["num_words"] == 2
    assert scores["attention"] == scores["subsets"]["held-out"]["attention"]
    names = ("peak_in_box", "peak_by_chance", "mass_in_box", "mass_by_chance")
    assert scores["subsets"]["seen"]["attention"] == {"all": {"num_words": 0, **dict.fromkeys(names)}}
    assert score_scenes(records[2:], captions, RESAMPLING) == {"num_images": 0}


def test_counts_and_the_changes_by_refinement():
    records = [record(1, *OBJECTS, OBJECTS[1]), record(2, *OBJECTS, subset="held-out")]
    captions = {1: generated(1, "two balls and two cubes"), 2: generated(2, "a cube behind a ball")}
    trained = {1: ("a", "ball", "and", "a", "ball"), 2: ("two", "blue", "balls")}
    scores = score_scenes(records, captions, RESAMPLING, trained_captions=trained)
    assert scores["counts"] == {"num_groups": 1, "accuracy": 1.0, "num_plurals": 2, "plural_accuracy": 0.5}
    assert scores["refinement"] == {
        "names": {"accuracy": change(0.5, 0.5, [-1.0, 1.0])},  # samples of one image twice: worse, or better
        "relations": {"accuracy": None},
        "counts": {"accuracy": change(0.0, 1.0, None), "plural_accuracy": change(0.0, 0.5, None)},
        "subsets": {
            "held-out": {
                "names": {"accuracy": change(0.0, 1.0, None)},
                "relations": {"accuracy": None},
                "counts": {"accuracy": None, "plural_accuracy": None},
            }
        },
    }
    assert "refinement" not in score_scenes(records, captions, RESAMPLING)
