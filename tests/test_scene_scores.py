from typing import Any

import numpy as np
import pytest

from pipeline.captions.records import AnnotatedObject, Record
from pipeline.evaluation.scene_scores import Grounded, grounded_words, score_scenes
from pipeline.generation.caption_io import GeneratedCaptions, RankedCaption

# A grid of 2 x 4 regions. The cube fills the left half of the upper row, the ball the last region of the lower one.
GRID = (2, 4)
CUBE, BALL = (0.0, 0.0, 0.5, 0.5), (0.75, 0.5, 0.25, 0.5)
THINGS = (
    AnnotatedObject(attributes={"shape": "cube", "color": "red", "size": "large", "texture": "matte"}, box=CUBE),
    AnnotatedObject(attributes={"shape": "sphere", "color": "blue", "size": "small", "texture": "shiny"}, box=BALL),
)
CAPTION = "a red cube stands to the left of a shiny ball"
LOOKED = {
    "red": [[0.5, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]],  # the first of two equal peaks, in the cube
    "cube": [[0.1, 0.1, 0.0, 0.0], [0.8, 0.0, 0.0, 0.0]],  # below it
    "left": [[0.2, 0.0, 0.3, 0.0], [0.0, 0.0, 0.1, 0.4]],  # the ball, and some of the cube
    "shiny": [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]],
    "ball": [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.7, 0.3]],
}


def record(image_id: int, *things: AnnotatedObject, subset: str | None = None) -> Record:
    return Record(image_id=image_id, file="a.png", split="test", captions=("A.",), subset=subset, objects=things)


def generated(image_id: int, caption: str) -> GeneratedCaptions:
    words = tuple(caption.split())
    attention = [np.ravel(LOOKED.get(word, np.full(GRID, 1 / 8))) for word in words]
    found = RankedCaption(words=words, log_probability=-1.0, score=-1.0)
    return GeneratedCaptions(image_id=image_id, captions=(found,), attention=np.array(attention, np.float16))


def attention_of(caption: str, *things: AnnotatedObject) -> dict[str, Any]:
    found: dict[str, Any] = score_scenes([record(1, *things)], {1: generated(1, caption)}, GRID)["attention"]
    return found


def row(words: int, peak: float, chance: float, mass: float, mass_by_chance: float) -> Any:
    numbers = {"peak_in_box": peak, "chance": chance, "mass_in_box": mass, "mass_by_chance": mass_by_chance}
    return {"words": words, **{name: pytest.approx(value, abs=1e-3) for name, value in numbers.items()}}


def test_peak_and_mass_by_kind_of_word_worked_by_hand():
    assert attention_of(CAPTION, *THINGS) == {
        "color": row(1, 1.0, 2 / 8, 0.5, 1 / 4),
        "shape": row(2, 0.0, (2 / 8 + 1 / 8) / 2, (0.2 + 0.3) / 2, (1 / 4 + 1 / 8) / 2),
        "texture": row(1, 1.0, 1 / 8, 1.0, 1 / 8),
        "relation": row(1, 1.0, 3 / 8, 0.6, 3 / 8),
        # Of the first three alone.
        "all": row(4, 2 / 4, (2 + 2 + 1 + 1) / 8 / 4, (0.5 + 0.2 + 0.3 + 1.0) / 4, (2 + 2 + 1 + 1) / 8 / 4),
    }


def test_uniform_attention_has_the_mass_that_chance_has():
    found = attention_of("a blue sphere", *THINGS)
    assert found["all"]["mass_in_box"] == found["all"]["mass_by_chance"] == 0.125


@pytest.mark.parametrize(
    ("caption", "kinds"),
    [
        ("a green ring stands to the left of a yellow cone", {}),  # nothing of it is shown
        ("a red cube stands to the left of a green ring", {1: "color", 2: "shape"}),  # one side of the relation is
        ("a red cube stands on the left of the picture", {1: "color", 2: "shape"}),
        (
            "a red cube and a ball are in front of a cube",
            {1: "color", 2: "shape", 5: "shape", 8: "relation", 11: "shape"},
        ),
        ("a ball behind a large cube", {1: "shape", 2: "relation", 4: "size", 5: "shape"}),
        ("a cube between a ball and a ball", {1: "shape", 2: "relation", 4: "shape", 7: "shape"}),
    ],
)
def test_words_that_speak_of_what_is_shown(caption, kinds):
    assert {word.position: word.kind for word in grounded_words(caption.split(), THINGS)} == kinds


def test_a_relation_speaks_of_all_things_on_both_its_sides():
    twin = AnnotatedObject(attributes=THINGS[0].attributes, box=(0.5, 0.0, 0.25, 0.5))
    found = grounded_words(["two", "red", "cubes", "stand", "behind", "a", "ball"], (*THINGS, twin))
    assert found[-1] == Grounded(position=4, kind="relation", boxes=(CUBE, BALL, twin.box))
    assert found[0].boxes == found[1].boxes == (CUBE, twin.box)


def test_subsets_are_scored_apart_and_images_without_things_not_at_all():
    records = [record(1, *THINGS, subset="seen"), record(2, *THINGS, subset="held-out"), record(3)]
    captions = {1: generated(1, "a shiny"), 2: generated(2, "a shiny ball"), 3: generated(3, "a cube")}
    found = score_scenes(records, captions, GRID)
    assert (found["images"], found["subsets"]["seen"]["images"]) == (2, 1)
    assert found["attention"]["all"]["words"] == 2
    assert found["attention"] == found["subsets"]["held-out"]["attention"]
    assert found["subsets"]["seen"]["attention"] == {"all": {"words": 0}}
    assert score_scenes(records[2:], captions, GRID) == {"images": 0}
