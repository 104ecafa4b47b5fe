"""The table of synonyms that caption templates and caption checker share.

Each attribute value and relation has synonyms with their probabilities in the dataset's captions. The checker accepts
every synonym, even those of probability 0.
"""

from collections.abc import Mapping

Synonyms = Mapping[str, float]
"""Synonyms with their probabilities."""

# Sampling follows the order of these tables: reordering them changes every caption of the dataset.
SHAPES: Mapping[str, Synonyms] = {
    "sphere": {"ball": 0.85, "sphere": 0.15},
    "cube": {"cube": 0.85, "block": 0.15},
    "cylinder": {"cylinder": 1.0},
    "cone": {"cone": 1.0},
    "ring": {"ring": 1.0},
    "pyramid": {"pyramid": 1.0},
}
COLORS: Mapping[str, Synonyms] = {
    "red": {"red": 1.0},
    "orange": {"orange": 1.0},
    "yellow": {"yellow": 1.0},
    "green": {"green": 1.0},
    "blue": {"blue": 1.0},
    "purple": {"purple": 1.0},
    "white": {"white": 1.0},
    "black": {"black": 1.0},
}
SIZES: Mapping[str, Synonyms] = {
    "small": {"small": 0.75, "little": 0.15, "tiny": 0.1},
    "large": {"large": 0.75, "big": 0.25},
}
TEXTURES: Mapping[str, Synonyms] = {
    "matte": {},  # never mentioned
    "shiny": {"shiny": 0.8, "metallic": 0.2},
    "striped": {"striped": 1.0},
    "spotted": {"spotted": 0.8, "dotted": 0.2},
}
FLOORS: Mapping[str, Synonyms] = {
    "wooden": {"on a wooden floor": 0.8, "on the wooden floor": 0.1, "on wooden boards": 0.1},
    "tiled": {"on a tiled floor": 0.8, "on the tiles": 0.1, "on a floor of tiles": 0.1},
    "sandy": {"on the sand": 0.8, "on sand": 0.1, "on sandy ground": 0.1},
    "grassy": {"on the grass": 0.8, "on grass": 0.1, "on a lawn": 0.1},
    "carpeted": {"on a carpet": 0.8, "on the carpet": 0.1, "on a carpeted floor": 0.1},
}
RELATIONS: Mapping[str, Synonyms] = {
    "left": {"to the left of": 0.85, "on the left of": 0.15},
    "right": {"to the right of": 1.0, "on the right of": 0.0},
    "front": {"in front of": 1.0},
    "behind": {"behind": 1.0},
    "between": {"between": 1.0},
}
"""Each phrase contains the name of its relation as a word."""

VERBS: Synonyms = {"stand": 0.8, "sit": 0.1, "rest": 0.05, "be": 0.05}
NUMBERS: Mapping[int, str] = {2: "two", 3: "three", 4: "four"}

_FLOOR_FUNCTION_WORDS = {"on", "a", "the", "of", "floor", "ground"}
"""Words of the floor phrases that occur with more than one floor."""


def pluralize(noun: str) -> str:
    """Return the plural of a noun; all nouns of the dataset are regular."""
    return noun + "s"


def conjugate(verb: str, *, plural: bool) -> str:
    """Return the third person of a verb in the present tense."""
    if verb == "be":
        return "are" if plural else "is"
    return verb if plural else verb + "s"


def most_probable(synonyms: Synonyms) -> str:
    """Return the synonym with the highest probability; the first one if there are several."""
    return max(synonyms, key=lambda synonym: synonyms[synonym])


def _word_meanings() -> dict[str, tuple[str, str]]:
    shapes = {word: ("shape", shape) for shape, synonyms in SHAPES.items() for word in synonyms}
    plural_shapes = {pluralize(word): meaning for word, meaning in shapes.items()}
    adjectives = {
        word: (kind, value)
        for kind, table in {"color": COLORS, "size": SIZES, "texture": TEXTURES}.items()
        for value, synonyms in table.items()
        for word in synonyms
    }
    floors = {
        word: ("floor", floor)
        for floor, phrases in FLOORS.items()
        for phrase in phrases
        for word in phrase.split()
        if word not in _FLOOR_FUNCTION_WORDS
    }
    relations = {relation: ("relation", relation) for relation in RELATIONS}
    return shapes | plural_shapes | adjectives | floors | relations


WORD_MEANINGS: Mapping[str, tuple[str, str]] = _word_meanings()
"""Kind and value of each content word: `ball` and `balls` map to `("shape", "sphere")`.

The kinds are `shape`, `color`, `size`, `texture`, `floor` and `relation`.
"""
