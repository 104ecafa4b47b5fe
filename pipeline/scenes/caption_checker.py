"""Judges what a caption says of a scene: which objects it names, and whether they are there and stand so.

Captions come as lower-cased words without punctuation. Any sequence of words is judged, however
ungrammatical: models write those too. What is there is told by the record's things.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.captions.records import AnnotatedObject

_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "sphere": ("sphere", "ball"),
        "cube": ("cube", "block"),
        "cylinder": ("cylinder",),
        "cone": ("cone",),
        "ring": ("ring",),
        "pyramid": ("pyramid",),
    },
    "color": {
        "red": ("red",),
        "orange": ("orange",),
        "yellow": ("yellow",),
        "green": ("green",),
        "blue": ("blue",),
        "purple": ("purple",),
        "white": ("white",),
        "black": ("black",),
    },
    "size": {"small": ("small", "little", "tiny"), "large": ("large", "big")},
    "texture": {"shiny": ("shiny", "metallic"), "striped": ("striped",), "spotted": ("spotted", "dotted")},
    "floor": {
        "wooden": ("wooden", "boards"),
        "tiled": ("tiled", "tiles"),
        "sandy": ("sand", "sandy"),
        "grassy": ("grass", "lawn"),
        "carpeted": ("carpet", "carpeted"),
    },
    "relation": {
        "left": ("left",),
        "right": ("right",),
        "front": ("front",),
        "behind": ("behind",),
        "between": ("between",),
    },
}
_SINGULAR_SHAPES = {word: ("shape", shape) for shape, words in _WORDS["shape"].items() for word in words}
_PLURAL_SHAPES = {word + "s": meaning for word, meaning in _SINGULAR_SHAPES.items()}
WORD_KINDS: dict[str, tuple[str, str]] = _PLURAL_SHAPES | {
    word: (kind, value) for kind, values in _WORDS.items() for value, words in values.items() for word in words
}
"""Kind and canonical value of each word that tells of the picture: `ball` means `("shape", "sphere")`."""

_ADJECTIVES = {"color", "size", "texture"}
_NUMBERS = {"a": 1, "an": 1, "one": 1, "another": 1, "two": 2, "three": 3, "four": 4}
_GROUND = {word for word, (kind, _) in WORD_KINDS.items() if kind == "floor"} | {"floor", "ground"}
_NOUNS = _SINGULAR_SHAPES.keys() | _PLURAL_SHAPES.keys() | _GROUND | {"object", "objects"}
_PLURALS = _PLURAL_SHAPES.keys() | {"objects"}
_OPENINGS = _NUMBERS.keys() | {"the"}
_NAMING = {"shape", "color"}
_VERBS = {"is", "are", "stand", "stands", "sit", "sits", "rest", "rests"}
_RELATIONS = {
    ("to", "the", "left", "of"): "left",
    ("on", "the", "left", "of"): "left",
    ("to", "the", "right", "of"): "right",
    ("on", "the", "right", "of"): "right",
    ("in", "front", "of"): "front",
    ("behind",): "behind",
    ("between",): "between",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mention:
    """A noun phrase that names objects by shape, by color or by both."""

    attributes: dict[str, str]
    """Canonical values of what is named, by kind: `shape`, `color`, `size`, `texture`."""
    positions: dict[str, int]
    """Index of the word that names each kind."""
    count: int
    """Objects spoken of: as numbered, else 2 for a plural and 1 for a singular."""
    start: int
    stop: int
    """The phrase is `words[start:stop]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """Words that tell how things stand to one another."""

    relation: str
    """`left`, `right`, `front`, `behind` or `between`."""
    position: int
    """Index of the word that names the relation."""
    subjects: tuple[Mention, ...]
    """What stands so; at least one."""
    objects: tuple[Mention, ...]
    """What it stands so to; at least one."""


def mentions(words: Sequence[str]) -> list[Mention]:
    """Find the noun phrases that name objects, in their order.

    A phrase may open with an article or a number; its first noun ends it, and so does a second adjective of
    one kind ("a red blue ball" names something red, and a blue ball).
    """
    found: list[Mention] = []
    start = 0
    while start < len(words):
        stop = _phrase_end(words, start)
        found += _mention(words, start, stop)
        start = stop
    return found


def matches(mention: Mention, things: Sequence[AnnotatedObject]) -> list[int]:
    """Give the places in `things` of those that the mention can mean: all that it names is true of them."""
    return _showing(mention.attributes, things)


def names_rightly(words: Sequence[str], things: Sequence[AnnotatedObject]) -> bool | None:
    """Tell whether every object that a caption names is there.

    An object is there when color and shape, as far as named, occur together on as many things as the mention
    counts; sizes and textures are not judged. None where the caption names no object.
    """
    named = [(mention.attributes, mention.count) for mention in mentions(words)]
    if not named:
        return None
    return all(
        len(_showing({kind: attributes[kind] for kind in _NAMING & attributes.keys()}, things)) >= count
        for attributes, count in named
    )


def statements(words: Sequence[str]) -> list[Statement]:
    """Find the words of place that have a subject and an object, in their order; others state nothing."""
    named = mentions(words)
    found: list[Statement] = []
    for start in range(len(words)):
        for phrase, relation in _RELATIONS.items():
            stop = start + len(phrase)
            if tuple(words[start:stop]) != phrase:
                continue
            subjects, objects = _subjects(words, named, start), _objects(words, named, stop)
            if subjects and objects:
                position = start + phrase.index(relation)
                found.append(Statement(relation=relation, position=position, subjects=subjects, objects=objects))
    return found


def relations(words: Sequence[str], things: Sequence[AnnotatedObject]) -> tuple[int, int]:
    """Count the statements of place that hold, and all that are made.

    "A and B stand to the left of C" makes two statements, "A stands between B and C" one. Sides are judged by
    the centers of boxes, depth by their lower edges: on level ground the lower in the picture is the nearer.
    """
    verdicts: list[bool] = []
    for said in statements(words):
        if said.relation == "between":
            verdicts += [_between(subject, said.objects[0], said.objects[-1], things) for subject in said.subjects]
        else:
            verdicts += [_stands(one, said.relation, other, things) for one in said.subjects for other in said.objects]
    return sum(verdicts), len(verdicts)


def _phrase_end(words: Sequence[str], start: int) -> int:
    seen: set[str] = set()
    for index in range(start, len(words)):
        kind, _ = WORD_KINDS.get(words[index], ("", ""))
        if words[index] in _NOUNS:
            return index + 1
        if kind in _ADJECTIVES and kind not in seen:
            seen.add(kind)
        elif not (words[index] == "other" or (index == start and words[index] in _OPENINGS)):
            return max(index, start + 1)
    return len(words)


def _mention(words: Sequence[str], start: int, stop: int) -> list[Mention]:
    last = words[stop - 1]
    meanings = {WORD_KINDS[words[i]][0]: i for i in range(start, stop) if words[i] in WORD_KINDS}
    if last in _GROUND or not _NAMING & meanings.keys():
        return []
    return [
        Mention(
            attributes={kind: WORD_KINDS[words[i]][1] for kind, i in meanings.items()},
            positions=meanings,
            count=_NUMBERS.get(words[start], 2 if last in _PLURALS else 1),
            start=start,
            stop=stop,
        )
    ]


def _showing(attributes: Mapping[str, str], things: Sequence[AnnotatedObject]) -> list[int]:
    return [i for i, thing in enumerate(things) if attributes.items() <= thing.attributes.items()]


def _subjects(words: Sequence[str], named: Sequence[Mention], start: int) -> tuple[Mention, ...]:
    """Give the mentions joined by "and" or nothing that end, but for a verb, at the word `start`."""
    while start > 0 and words[start - 1] in _VERBS:
        start -= 1
    joined: list[Mention] = []
    for mention in reversed([mention for mention in named if mention.stop <= start]):
        if list(words[mention.stop : start]) not in ([], ["and"]):
            break
        joined.append(mention)
        start = mention.start
    return tuple(joined)


def _objects(words: Sequence[str], named: Sequence[Mention], stop: int) -> tuple[Mention, ...]:
    """Give the mentions joined by "and" or nothing that begin at the word `stop`."""
    joined: list[Mention] = []
    for mention in [mention for mention in named if mention.start >= stop]:
        if list(words[stop : mention.start]) not in ([], ["and"]):
            break
        joined.append(mention)
        stop = mention.stop
    return tuple(joined)


def _stands(subject: Mention, relation: str, other: Mention, things: Sequence[AnnotatedObject]) -> bool:
    """Tell whether as many things as the subject counts stand so to as many things as the other counts."""

    def stands(one: int, place: int) -> bool:
        match relation:
            case "left":
                return _center(things[one]) < _center(things[place])
            case "right":
                return _center(things[one]) > _center(things[place])
            case "front":
                return _foot(things[one]) > _foot(things[place])
            case _:
                return _foot(things[one]) < _foot(things[place])

    others = matches(other, things)
    standing = [one for one in matches(subject, things) if sum(stands(one, place) for place in others) >= other.count]
    return len(standing) >= subject.count


def _between(subject: Mention, first: Mention, last: Mention, things: Sequence[AnnotatedObject]) -> bool:
    pairs = [
        sorted((_center(things[one]), _center(things[other])))
        for one in matches(first, things)
        for other in matches(last, things)
    ]
    centers = [_center(things[one]) for one in matches(subject, things)]
    return sum(any(left < center < right for left, right in pairs) for center in centers) >= subject.count


def _center(thing: AnnotatedObject) -> float:
    left, _, width, _ = thing.box
    return left + width / 2


def _foot(thing: AnnotatedObject) -> float:
    _, top, _, height = thing.box
    return top + height
