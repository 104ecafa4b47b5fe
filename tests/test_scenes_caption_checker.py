import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.captions.records import AnnotatedObject
from pipeline.scenes.caption_checker import (
    count_groups,
    count_plurals,
    count_relations,
    find_mentions,
    find_relations,
    matching_objects,
    names_correctly,
)
from pipeline.scenes.caption_templates import canonical_caption, sample_captions
from pipeline.scenes.scene import COLORS, Scene, SceneObject, sample_scene
from pipeline.scenes.synonyms import WORD_MEANINGS

SEEDS = st.integers(0, 2**32 - 1)
FUNCTION_WORDS = ["a", "the", "two", "other", "objects", "and", "on", "in", "to", "of", "is", "stand", "floor", "?"]
ANY_WORDS = st.lists(st.sampled_from([*WORD_MEANINGS, *FUNCTION_WORDS]), max_size=25)


def kind_of(word: str) -> str | None:
    return WORD_MEANINGS[word][0] if word in WORD_MEANINGS else None


def words(caption: str) -> list[str]:
    return re.findall("[a-z]+", caption.lower())


def annotated(color: str, shape: str, x: float, bottom: float = 0.6, size: str = "small") -> AnnotatedObject:
    attributes = {"shape": shape, "color": color, "size": size, "texture": "matte"}
    return AnnotatedObject(attributes=attributes, box=(x - 0.05, bottom - 0.1, 0.1, 0.1))


def project(obj: SceneObject) -> AnnotatedObject:
    """Annotate an object as seen by a camera of height 2.7, approximately."""
    width = (1.0 if obj.size == "large" else 0.55) * 1.8 / obj.z
    center_x, bottom = 0.5 + 1.8 * obj.x / obj.z, 2.7 / obj.z
    attributes: dict[str, str] = {
        "shape": obj.shape,
        "color": obj.color,
        "size": obj.size,
        "texture": obj.texture,
    }
    return AnnotatedObject(attributes=attributes, box=(center_x - width / 2, bottom - width, width, width))


def sample(seed: int) -> tuple[Scene, list[AnnotatedObject], list[list[str]]]:
    """Sample a scene; return it, its annotated objects, and the words of its captions with the canonical one last."""
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, forbidden=frozenset(), required=None, duplicate_rate=0.35)
    center_x = [0.5 + 1.8 * obj.x / obj.z for obj in scene.objects]
    captions = [*sample_captions(scene, rng, center_x), canonical_caption(scene, center_x)]
    return scene, [project(obj) for obj in scene.objects], [words(caption) for caption in captions]


OBJECTS = [
    annotated("red", "cube", 0.2),
    annotated("red", "cube", 0.4, size="large"),
    annotated("blue", "sphere", 0.6, bottom=0.8),
    annotated("green", "ring", 0.8, bottom=0.4),
]


def test_mentions_have_attributes_positions_and_counts() -> None:
    mentions = find_mentions(words("Two tiny dotted red blocks stand behind an orange ball on a wooden floor."))
    assert [mention.attributes for mention in mentions] == [
        {"size": "small", "texture": "spotted", "color": "red", "shape": "cube"},
        {"color": "orange", "shape": "sphere"},
    ]
    assert [mention.positions for mention in mentions] == [
        {"size": 1, "texture": 2, "color": 3, "shape": 4},
        {"color": 8, "shape": 9},
    ]
    assert [(mention.count, mention.start, mention.stop) for mention in mentions] == [(2, 0, 5), (1, 7, 10)]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("red cubes", [(2, {"color": "red", "shape": "cube"})]),
        ("the red cube", [(1, {"color": "red", "shape": "cube"})]),
        ("another cone", [(1, {"shape": "cone"})]),
        ("two other objects", []),
        ("two other red objects", [(2, {"color": "red"})]),
        ("a red blue ball", [(1, {"color": "red"}), (1, {"color": "blue", "shape": "sphere"})]),
        ("a red and a", [(1, {"color": "red"})]),
        ("a small white carpet", []),
        ("three striped", []),
        ("", []),
    ],
)
def test_mentions_of_unusual_phrases(caption: str, expected: list[tuple[int, dict[str, str]]]) -> None:
    assert [(mention.count, mention.attributes) for mention in find_mentions(words(caption))] == expected


@pytest.mark.parametrize(("phrase", "indices"), [("red cube", [0, 1]), ("big red cube", [1]), ("blue cube", [])])
def test_matching_objects_have_all_attributes_of_the_mention(phrase: str, indices: list[int]) -> None:
    (mention,) = find_mentions(phrase.split())
    assert matching_objects(mention, OBJECTS) == indices


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("two red cubes and a blue ball", True),
        ("three red cubes", False),
        ("a red ball and a blue cube", False),
        ("a cube", True),
        ("a cone", False),
        ("two red objects", True),
        ("something purple", False),
        ("a large blue ball", True),
        ("the tiles on the left", None),
    ],
)
def test_names_correctly(caption: str, expected: bool | None) -> None:
    assert names_correctly(words(caption), OBJECTS) is expected


@pytest.mark.parametrize(
    ("caption", "num_counted", "plurals"),
    [
        ("two red cubes and a blue ball", 1, (1, 1)),
        ("two cubes", 1, (1, 1)),
        ("two red objects", 1, (1, 1)),
        ("red cubes", 1, (1, 1)),
        ("a red cube and a red cube", 0, (0, 0)),
        ("three red cubes", 0, (0, 1)),
        ("two blue balls and two red cubes", 1, (1, 2)),
        ("a red cube and two other objects", 0, (0, 0)),
        ("two purple cones", 0, (0, 1)),
        ("", 0, (0, 0)),
    ],
)
def test_counts(caption: str, num_counted: int, plurals: tuple[int, int]) -> None:
    assert count_groups(words(caption), OBJECTS) == (num_counted, 1)
    assert count_plurals(words(caption), OBJECTS) == plurals


def test_each_group_must_be_counted() -> None:
    objects = [annotated("red", "cube", 0.1), annotated("blue", "cube", 0.5), *OBJECTS]
    objects.append(annotated("blue", "cube", 0.9))
    assert count_groups(words("three red cubes and two blue cubes"), objects) == (2, 2)
    assert count_groups(words("two blue cubes and a red cube"), objects) == (1, 2)
    assert count_groups(words("five cubes"), objects) == (0, 2)
    assert count_groups(words("two red cubes"), OBJECTS[:1]) == (0, 0)


@pytest.mark.parametrize(
    ("caption", "num_correct", "num_total"),
    [
        ("a red cube stands to the left of a blue ball", 1, 1),
        ("a blue ball is to the right of two red cubes", 1, 1),
        ("a blue ball is on the right of two red cubes", 1, 1),
        ("a blue ball is on the left of two red cubes", 0, 1),
        ("two red cubes stand to the left of a blue ball and a green ring", 2, 2),
        ("two red cubes and a green ring are on the left of a blue ball on the sand", 1, 2),
        ("a blue ball sits in front of a green ring", 1, 1),
        ("a blue ball sits behind a green ring", 0, 1),
        ("a blue ball rests between two red cubes and a green ring", 1, 1),
        ("a green ring rests between a red cube and a blue ball", 0, 1),
        ("a blue ball stands between two red cubes", 0, 1),
        ("a purple cone stands to the left of a green ring", 0, 1),
        ("a red cube stands on the left of the picture", 0, 0),
        ("to the left of a red cube", 0, 0),
        ("from left to right there are two red cubes and a blue ball", 0, 0),
    ],
)
def test_count_relations(caption: str, num_correct: int, num_total: int) -> None:
    assert count_relations(words(caption), OBJECTS) == (num_correct, num_total)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red cube and a ball are in front of a ring", [("front", 8, ["cube", "sphere"], ["ring"])]),
        ("a ball stands between a red cube and a ring", [("between", 3, ["sphere"], ["cube", "ring"])]),
        (
            "a ball behind a ring on the left of a cube",
            [("behind", 2, ["sphere"], ["ring"]), ("left", 7, ["ring"], ["cube"])],
        ),
        ("a ball on the left of the picture", []),
        ("behind a ball", []),
    ],
)
def test_find_relations(caption: str, expected: list[tuple[str, int, list[str], list[str]]]) -> None:
    relations = [
        (
            relation.name,
            relation.position,
            sorted(mention.attributes["shape"] for mention in relation.subjects),
            sorted(mention.attributes["shape"] for mention in relation.landmarks),
        )
        for relation in find_relations(words(caption))
    ]
    assert relations == expected


@pytest.mark.slow
@given(SEEDS)
def test_captions_of_a_scene_are_correct_for_it(seed: int) -> None:
    scene, objects, captions = sample(seed)
    for caption in captions:
        assert names_correctly(caption, objects) is True
        assert all(matching_objects(mention, objects) for mention in find_mentions(caption))
        for count in (count_groups, count_plurals, count_relations):
            num_correct, num_total = count(caption, objects)
            assert num_correct == num_total
        floors = {WORD_MEANINGS[word][1] for word in caption if kind_of(word) == "floor"}
        assert floors <= {scene.floor}


@pytest.mark.slow
@given(SEEDS, st.data())
def test_a_color_that_is_not_in_the_scene_is_incorrect(seed: int, data: st.DataObject) -> None:
    scene, objects, captions = sample(seed)
    caption = data.draw(st.sampled_from(captions))
    absent = sorted(set(COLORS) - {obj.color for obj in scene.objects})
    index = data.draw(st.sampled_from([i for i, word in enumerate(caption) if word in COLORS]))
    caption[index] = data.draw(st.sampled_from(absent))
    assert names_correctly(caption, objects) is False


@given(SEEDS)
def test_swapping_left_and_right_makes_relations_incorrect(seed: int) -> None:
    _, objects, captions = sample(seed)
    swapped = {"left": "right", "right": "left"}
    for caption in captions:
        if "left" in caption and "between" not in caption:
            num_correct, _ = count_relations([swapped.get(word, word) for word in caption], objects)
            assert num_correct == 0


@given(ANY_WORDS)
def test_any_sequence_of_words_is_accepted(caption: list[str]) -> None:
    mentions = find_mentions(caption)
    for mention in mentions:
        assert mention.count >= 1
        assert mention.attributes.keys() & {"shape", "color"}
        assert mention.attributes.keys() == mention.positions.keys()
        for kind, index in mention.positions.items():
            assert mention.start <= index < mention.stop
            assert WORD_MEANINGS[caption[index]] == (kind, mention.attributes[kind])
    assert all(first.stop <= second.start for first, second in pairwise(mentions))
    indices = {index for mention in mentions for index in mention.positions.values()}
    assert indices >= {index for index, word in enumerate(caption) if kind_of(word) == "shape"}

    assert (names_correctly(caption, OBJECTS) is None) == (not mentions)
    for count in (count_groups, count_plurals, count_relations):
        num_correct, num_total = count(caption, OBJECTS)
        assert 0 <= num_correct <= num_total
