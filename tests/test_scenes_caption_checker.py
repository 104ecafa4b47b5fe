import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.captions.records import AnnotatedObject
from pipeline.scenes import caption_checker as judge
from pipeline.scenes.caption_checker import WORD_KINDS
from pipeline.scenes.caption_templates import canonical_caption, captions
from pipeline.scenes.scene import COLORS, FLOORS, SHAPES, SIZES, Body, Scene, draw_scene

SEEDS = st.integers(0, 2**32 - 1)
GLUE = ["a", "the", "two", "other", "objects", "and", "on", "in", "to", "of", "is", "stand", "floor", "?"]
ANY_WORDS = st.lists(st.sampled_from([*WORD_KINDS, *GLUE]), max_size=25)


def kind_of(word: str) -> str | None:
    return WORD_KINDS[word][0] if word in WORD_KINDS else None


def words(caption: str) -> list[str]:
    return re.findall("[a-z]+", caption.lower())


def thing(color: str, shape: str, across: float, foot: float = 0.6, size: str = "small") -> AnnotatedObject:
    attributes = {"shape": shape, "color": color, "size": size, "texture": "matte"}
    return AnnotatedObject(attributes=attributes, box=(across - 0.05, foot - 0.1, 0.1, 0.1))


def seen(body: Body) -> AnnotatedObject:
    """Project a body as a camera of height 2.7 does, near enough."""
    width = (1.0 if body.size == "large" else 0.55) * 1.8 / body.z
    center, foot = 0.5 + 1.8 * body.x / body.z, 2.7 / body.z
    attributes: dict[str, str] = {
        "shape": body.shape,
        "color": body.color,
        "size": body.size,
        "texture": body.texture,
    }
    return AnnotatedObject(attributes=attributes, box=(center - width / 2, foot - width, width, width))


def drawn(seed: int) -> tuple[Scene, list[AnnotatedObject], list[list[str]]]:
    """Draw a scene, its things, and the words of its five captions and its canonical one."""
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng, forbidden=frozenset(), required=None, duplicate_rate=0.35)
    across = [0.5 + 1.8 * body.x / body.z for body in scene.bodies]
    told = [*captions(scene, rng, across), canonical_caption(scene, across)]
    return scene, [seen(body) for body in scene.bodies], [words(caption) for caption in told]


ROOM = [
    thing("red", "cube", 0.2),
    thing("red", "cube", 0.4, size="large"),
    thing("blue", "sphere", 0.6, foot=0.8),
    thing("green", "ring", 0.8, foot=0.4),
]


def test_mentions_give_attributes_places_and_counts() -> None:
    found = judge.mentions(words("Two tiny dotted red blocks stand behind an orange ball on a wooden floor."))
    assert [mention.attributes for mention in found] == [
        {"size": "small", "texture": "spotted", "color": "red", "shape": "cube"},
        {"color": "orange", "shape": "sphere"},
    ]
    assert [mention.positions for mention in found] == [
        {"size": 1, "texture": 2, "color": 3, "shape": 4},
        {"color": 8, "shape": 9},
    ]
    assert [(mention.count, mention.start, mention.stop) for mention in found] == [(2, 0, 5), (1, 7, 10)]


@pytest.mark.parametrize(
    ("caption", "named"),
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
def test_mentions_of_odd_phrases(caption: str, named: list[tuple[int, dict[str, str]]]) -> None:
    assert [(mention.count, mention.attributes) for mention in judge.mentions(words(caption))] == named


def test_a_mention_matches_things_of_which_all_it_names_is_true() -> None:
    assert judge.matches(judge.mentions(["red", "cube"])[0], ROOM) == [0, 1]
    assert judge.matches(judge.mentions(["big", "red", "cube"])[0], ROOM) == [1]
    assert judge.matches(judge.mentions(["blue", "cube"])[0], ROOM) == []


@pytest.mark.parametrize(
    ("caption", "verdict"),
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
def test_names_rightly(caption: str, verdict: bool | None) -> None:
    assert judge.names_rightly(words(caption), ROOM) is verdict


@pytest.mark.parametrize(
    ("caption", "right", "total"),
    [
        ("a red cube stands to the left of a blue ball", 1, 1),
        ("a blue ball is to the right of two red cubes", 1, 1),
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
def test_relations(caption: str, right: int, total: int) -> None:
    assert judge.relations(words(caption), ROOM) == (right, total)


@pytest.mark.parametrize(
    ("caption", "wanted"),
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
def test_statements(caption: str, wanted: list[tuple[str, int, list[str], list[str]]]) -> None:
    found = [
        (
            said.relation,
            said.position,
            sorted(mention.attributes["shape"] for mention in said.subjects),
            sorted(mention.attributes["shape"] for mention in said.objects),
        )
        for said in judge.statements(words(caption))
    ]
    assert found == wanted


@given(SEEDS)
def test_captions_of_a_scene_are_judged_right_for_it(seed: int) -> None:
    scene, things, told = drawn(seed)
    for caption in told:
        assert judge.names_rightly(caption, things) is True
        assert all(judge.matches(mention, things) for mention in judge.mentions(caption))
        right, total = judge.relations(caption, things)
        assert right == total
        floors = {WORD_KINDS[word][1] for word in caption if kind_of(word) == "floor"}
        assert floors <= {scene.floor}


@given(SEEDS, st.data())
def test_a_color_that_is_not_in_the_scene_is_judged_wrong(seed: int, data: st.DataObject) -> None:
    scene, things, told = drawn(seed)
    caption = data.draw(st.sampled_from(told))
    absent = sorted(set(COLORS) - {body.color for body in scene.bodies})
    place = data.draw(st.sampled_from([i for i, word in enumerate(caption) if word in COLORS]))
    caption[place] = data.draw(st.sampled_from(absent))
    assert judge.names_rightly(caption, things) is False


@given(SEEDS)
def test_swapped_sides_are_judged_wrong(seed: int) -> None:
    _, things, told = drawn(seed)
    mirror = {"left": "right", "right": "left"}
    for caption in told:
        if "left" in caption and "between" not in caption:
            right, _ = judge.relations([mirror.get(word, word) for word in caption], things)
            assert right == 0


@given(ANY_WORDS)
def test_any_words_are_judged(caption: list[str]) -> None:
    found = judge.mentions(caption)
    for mention in found:
        assert mention.count >= 1
        assert mention.attributes.keys() & {"shape", "color"}
        assert mention.attributes.keys() == mention.positions.keys()
        for kind, place in mention.positions.items():
            assert mention.start <= place < mention.stop
            assert WORD_KINDS[caption[place]] == (kind, mention.attributes[kind])
    assert all(one.stop <= other.start for one, other in pairwise(found))
    named = {place for mention in found for place in mention.positions.values()}
    assert named >= {place for place, word in enumerate(caption) if kind_of(word) == "shape"}

    assert (judge.names_rightly(caption, ROOM) is None) == (not found)
    right, total = judge.relations(caption, ROOM)
    assert 0 <= right <= total


def test_every_value_of_the_world_but_matte_has_words() -> None:
    meanings = set(WORD_KINDS.values())
    for kind, values in {"shape": SHAPES, "color": COLORS, "size": SIZES, "floor": FLOORS}.items():
        assert {value for other, value in meanings if other == kind} == set(values)
    assert {value for kind, value in meanings if kind == "texture"} == {"shiny", "striped", "spotted"}
