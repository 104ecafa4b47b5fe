"""Checker of captions against the annotated objects of an image: named objects and spatial relations.

Captions are lowercase words without punctuation. Any sequence of words is accepted, however ungrammatical, since models
generate those too. The words are those of `pipeline.scenes.synonyms`, which the caption templates use too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.captions.records import AnnotatedObject
from pipeline.scenes.synonyms import NUMBERS, RELATIONS, SHAPES, VERBS, WORD_MEANINGS, conjugate, pluralize

_SINGULAR_NOUNS = {word for synonyms in SHAPES.values() for word in synonyms} | {"object"}
_PLURAL_NOUNS = {pluralize(noun) for noun in _SINGULAR_NOUNS}
_FLOOR_NOUNS = {word for word, (kind, _) in WORD_MEANINGS.items() if kind == "floor"} | {"floor", "ground"}
_NOUNS = _SINGULAR_NOUNS | _PLURAL_NOUNS | _FLOOR_NOUNS
_ADJECTIVE_KINDS = {"color", "size", "texture"}
_NAMING_KINDS = {"shape", "color"}
_COUNTS = {"a": 1, "an": 1, "one": 1, "another": 1} | {word: count for count, word in NUMBERS.items()}
_DETERMINERS = _COUNTS.keys() | {"the"}
_VERB_FORMS = {conjugate(verb, plural=plural) for verb in VERBS for plural in (False, True)}
_RELATION_PHRASES = {tuple(phrase.split()): relation for relation, phrases in RELATIONS.items() for phrase in phrases}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mention:
    """A noun phrase that names objects by shape, color or both."""

    attributes: dict[str, str]
    """Value of each attribute in the phrase, by kind: `shape`, `color`, `size`, `texture`."""
    positions: dict[str, int]
    """Index of the word that gives each attribute."""
    count: int
    """Number of objects: a numeral's value, else 2 for a plural and 1 for a singular."""
    start: int
    stop: int
    """The phrase is `words[start:stop]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """A spatial relation between the objects of two or more noun phrases."""

    name: str
    """`left`, `right`, `front`, `behind` or `between`."""
    position: int
    """Index of the word that names the relation."""
    subjects: tuple[Mention, ...]
    """Objects whose location is described; at least one mention."""
    landmarks: tuple[Mention, ...]
    """Objects that they are located relative to; at least one mention."""


def find_mentions(words: Sequence[str]) -> list[Mention]:
    """Find the noun phrases that name objects, in order.

    A phrase may begin with a determiner. It ends after its first noun, or before a second adjective of the same kind:
    "a red blue ball" mentions something red and a blue ball.
    """
    mentions: list[Mention] = []
    start = 0
    while start < len(words):
        stop = _phrase_end(words, start)
        mentions += _parse_mention(words, start, stop)
        start = stop
    return mentions


def matching_objects(mention: Mention, objects: Sequence[AnnotatedObject]) -> list[int]:
    """Return the indices of the objects that have all attributes of a mention."""
    return _with_attributes(mention.attributes, objects)


def names_correctly(words: Sequence[str], objects: Sequence[AnnotatedObject]) -> bool | None:
    """Whether the image contains every object that a caption names; None if it names none.

    For each mention, as many objects as it counts must have its color and shape. Sizes and textures are ignored.
    """
    mentions = find_mentions(words)
    if not mentions:
        return None
    return all(_num_named(mention, objects) >= mention.count for mention in mentions)


def count_groups(words: Sequence[str], objects: Sequence[AnnotatedObject]) -> tuple[int, int]:
    """Count the groups of objects of one color and shape whose number a caption states.

    "Two red cubes" states it for two red cubes. It does not for three, and neither does "a red cube and a red cube".

    Returns:
        Number of groups whose number a mention states, and number of groups of two or more objects.
    """
    groups = {tuple(_with_attributes(_naming_attributes(item.attributes), objects)) for item in objects}
    plural_groups = {indices for indices in groups if len(indices) > 1}
    stated = {
        tuple(_with_attributes(_naming_attributes(mention.attributes), objects))
        for mention in find_mentions(words)
        if _states_number(mention, objects)
    }
    return len(plural_groups & stated), len(plural_groups)


def count_plurals(words: Sequence[str], objects: Sequence[AnnotatedObject]) -> tuple[int, int]:
    """Count the mentions of two or more objects.

    Returns:
        Number of mentions whose number is that of the objects of the named color and shape, and number of all.
    """
    plurals = [mention for mention in find_mentions(words) if mention.count > 1]
    return sum(_states_number(mention, objects) for mention in plurals), len(plurals)


def find_relations(words: Sequence[str]) -> list[Relation]:
    """Find the spatial relations that have both subjects and landmarks, in order."""
    mentions = find_mentions(words)
    relations: list[Relation] = []
    for start in range(len(words)):
        for phrase, name in _RELATION_PHRASES.items():
            stop = start + len(phrase)
            if tuple(words[start:stop]) != phrase:
                continue
            subjects, landmarks = _mentions_before(words, mentions, start), _mentions_after(words, mentions, stop)
            if subjects and landmarks:
                position = start + phrase.index(name)
                relations.append(Relation(name=name, position=position, subjects=subjects, landmarks=landmarks))
    return relations


def count_relations(words: Sequence[str], objects: Sequence[AnnotatedObject]) -> tuple[int, int]:
    """Count the spatial relations of a caption between pairs of mentions.

    "A and B stand to the left of C" has two relations, "A stands between B and C" one. `left` and `right` compare the
    centers of bounding boxes, `front` and `behind` their lower edges: on a level floor, the lower edge is nearer.

    Returns:
        Number of relations that hold, and number of all relations.
    """
    results: list[bool] = []
    for relation in find_relations(words):
        first, last = relation.landmarks[0], relation.landmarks[-1]
        if relation.name == "between":
            results += [_is_between(subject, first, last, objects) for subject in relation.subjects]
        else:
            results += [
                _relation_holds(relation.name, subject, landmark, objects)
                for subject in relation.subjects
                for landmark in relation.landmarks
            ]
    return sum(results), len(results)


def _phrase_end(words: Sequence[str], start: int) -> int:
    kinds: set[str] = set()
    for index in range(start, len(words)):
        kind, _ = WORD_MEANINGS.get(words[index], ("", ""))
        if words[index] in _NOUNS:
            return index + 1
        if kind in _ADJECTIVE_KINDS and kind not in kinds:
            kinds.add(kind)
        elif not (words[index] == "other" or (index == start and words[index] in _DETERMINERS)):
            return max(index, start + 1)
    return len(words)


def _parse_mention(words: Sequence[str], start: int, stop: int) -> list[Mention]:
    """Return the mention in `words[start:stop]`, or nothing if the phrase names no object."""
    last_word = words[stop - 1]
    positions = {WORD_MEANINGS[words[i]][0]: i for i in range(start, stop) if words[i] in WORD_MEANINGS}
    if last_word in _FLOOR_NOUNS or not _NAMING_KINDS & positions.keys():
        return []
    return [
        Mention(
            attributes={kind: WORD_MEANINGS[words[i]][1] for kind, i in positions.items()},
            positions=positions,
            count=_COUNTS.get(words[start], 2 if last_word in _PLURAL_NOUNS else 1),
            start=start,
            stop=stop,
        )
    ]


def _num_named(mention: Mention, objects: Sequence[AnnotatedObject]) -> int:
    """Return the number of objects with the color and shape of a mention."""
    return len(_with_attributes(_naming_attributes(mention.attributes), objects))


def _states_number(mention: Mention, objects: Sequence[AnnotatedObject]) -> bool:
    return mention.count == _num_named(mention, objects)


def _naming_attributes(attributes: Mapping[str, str]) -> dict[str, str]:
    return {kind: value for kind, value in attributes.items() if kind in _NAMING_KINDS}


def _with_attributes(attributes: Mapping[str, str], objects: Sequence[AnnotatedObject]) -> list[int]:
    return [index for index, obj in enumerate(objects) if attributes.items() <= obj.attributes.items()]


def _mentions_before(words: Sequence[str], mentions: Sequence[Mention], stop: int) -> tuple[Mention, ...]:
    """Return the mentions, joined by "and" or by nothing, that end at `stop` or at a verb before it."""
    while stop > 0 and words[stop - 1] in _VERB_FORMS:
        stop -= 1
    joined: list[Mention] = []
    for mention in reversed([mention for mention in mentions if mention.stop <= stop]):
        if list(words[mention.stop : stop]) not in ([], ["and"]):
            break
        joined.append(mention)
        stop = mention.start
    return tuple(joined)


def _mentions_after(words: Sequence[str], mentions: Sequence[Mention], start: int) -> tuple[Mention, ...]:
    """Return the mentions, joined by "and" or by nothing, that begin at `start`."""
    joined: list[Mention] = []
    for mention in [mention for mention in mentions if mention.start >= start]:
        if list(words[start : mention.start]) not in ([], ["and"]):
            break
        joined.append(mention)
        start = mention.stop
    return tuple(joined)


def _relation_holds(name: str, subject: Mention, landmark: Mention, objects: Sequence[AnnotatedObject]) -> bool:
    """Whether as many objects as the subject counts are so located relative to as many as the landmark counts."""

    def holds(a: AnnotatedObject, b: AnnotatedObject) -> bool:
        match name:
            case "left":
                return _center_x(a) < _center_x(b)
            case "right":
                return _center_x(a) > _center_x(b)
            case "front":
                return _bottom(a) > _bottom(b)
            case _:
                return _bottom(a) < _bottom(b)

    landmark_objects = [objects[i] for i in matching_objects(landmark, objects)]
    num_holding = sum(
        sum(holds(objects[i], landmark_object) for landmark_object in landmark_objects) >= landmark.count
        for i in matching_objects(subject, objects)
    )
    return num_holding >= subject.count


def _is_between(subject: Mention, first: Mention, last: Mention, objects: Sequence[AnnotatedObject]) -> bool:
    """Whether as many objects as the subject counts are between an object of `first` and one of `last`."""
    intervals = [
        sorted((_center_x(objects[i]), _center_x(objects[j])))
        for i in matching_objects(first, objects)
        for j in matching_objects(last, objects)
    ]
    centers = [_center_x(objects[i]) for i in matching_objects(subject, objects)]
    return sum(any(left < center < right for left, right in intervals) for center in centers) >= subject.count


def _center_x(obj: AnnotatedObject) -> float:
    left, _, width, _ = obj.box
    return left + width / 2


def _bottom(obj: AnnotatedObject) -> float:
    _, top, _, height = obj.box
    return top + height
