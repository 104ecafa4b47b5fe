import pytest

from pipeline.scenes import scene
from pipeline.scenes.synonyms import (
    COLORS,
    FLOORS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    VERBS,
    WORD_MEANINGS,
    conjugate,
    most_probable,
)


def test_every_attribute_value_of_a_scene_has_an_entry_in_the_same_order() -> None:
    tables = [(SHAPES, scene.SHAPES), (COLORS, scene.COLORS), (SIZES, scene.SIZES), (TEXTURES, scene.TEXTURES)]
    for table, values in [*tables, (FLOORS, scene.FLOORS)]:
        assert tuple(table) == values


@pytest.mark.parametrize("table", [SHAPES, COLORS, SIZES, TEXTURES, FLOORS, RELATIONS, {"verbs": VERBS}])
def test_probabilities_sum_to_1(table: dict[str, dict[str, float]]) -> None:
    for synonyms in table.values():
        assert not synonyms or sum(synonyms.values()) == pytest.approx(1)


def test_relation_phrases_contain_the_name_of_their_relation() -> None:
    for relation, phrases in RELATIONS.items():
        assert all(relation in phrase.split() for phrase in phrases)


def test_each_word_has_one_meaning() -> None:
    words = [word for table in (SHAPES, COLORS, SIZES, TEXTURES) for synonyms in table.values() for word in synonyms]
    assert len(words) == len(set(words))
    assert {WORD_MEANINGS[word] for word in words} == {
        (kind, value)
        for kind, table in {"shape": SHAPES, "color": COLORS, "size": SIZES, "texture": TEXTURES}.items()
        for value, synonyms in table.items()
        if synonyms
    }


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("balls", ("shape", "sphere")),
        ("block", ("shape", "cube")),
        ("tiny", ("size", "small")),
        ("metallic", ("texture", "shiny")),
        ("lawn", ("floor", "grassy")),
        ("boards", ("floor", "wooden")),
        ("front", ("relation", "front")),
    ],
)
def test_word_meanings(word: str, meaning: tuple[str, str]) -> None:
    assert WORD_MEANINGS[word] == meaning


def test_words_shared_by_all_floors_have_no_meaning() -> None:
    assert not {"on", "a", "the", "of", "floor", "ground"} & WORD_MEANINGS.keys()
    floor_words = {word for word, (kind, _) in WORD_MEANINGS.items() if kind == "floor"}
    assert {WORD_MEANINGS[word][1] for word in floor_words} == set(FLOORS)


@pytest.mark.parametrize(
    ("verb", "singular", "plural"), [("stand", "stands", "stand"), ("rest", "rests", "rest"), ("be", "is", "are")]
)
def test_conjugate(verb: str, singular: str, plural: str) -> None:
    assert (conjugate(verb, plural=False), conjugate(verb, plural=True)) == (singular, plural)


def test_most_probable_synonym() -> None:
    assert most_probable(SHAPES["sphere"]) == "ball"
