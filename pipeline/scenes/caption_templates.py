"""Caption templates: five true sentences for each scene, varied as if by five annotators.

Identical objects share one phrase ("two small red cubes"). Most sentences list objects from left to right, so a caption
is predictable from the image up to the annotator's choice of synonyms, attributes and template. A relation is mentioned
only where it holds by a clear margin.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.scenes.scene import Scene, SceneObject
from pipeline.scenes.synonyms import (
    FLOORS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    VERBS,
    conjugate,
    most_probable,
    pluralize,
)

CAPTIONS_PER_SCENE = 5

MIN_X_DIFFERENCE = 0.08
"""Minimum horizontal distance for `left` and `right`, as a fraction of the image's width."""
MIN_Z_DIFFERENCE = 0.8
"""Minimum difference in depth for `front` and `behind`, in world units."""

Choose = Callable[[Mapping[str, float]], str]
"""Function that chooses one of several strings, given their weights."""

_RIGHT_OF, _IN_FRONT_OF, _BEHIND, _BETWEEN = (
    most_probable(RELATIONS[relation]) for relation in ("right", "front", "behind", "between")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _ObjectGroup:
    """Identical objects, which share one phrase."""

    phrase: str
    center_x: tuple[float, ...]
    """Horizontal center of each object, as a fraction of the image's width."""
    z: tuple[float, ...]
    """Depth of each object, in world units."""

    @property
    def is_plural(self) -> bool:
        return len(self.z) > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Style:
    """Choices of an annotator that hold for all templates of a sentence."""

    verb: str
    left_of: str
    floor: str
    optional_floor: str
    """`floor`, or an empty string if the annotator omits it in templates with a relation."""
    nearest_first: bool
    """Whether objects are listed from near to far instead of from left to right."""

    def verb_for(self, *subjects: _ObjectGroup) -> str:
        """Conjugate the verb to agree with its subjects."""
        return conjugate(self.verb, plural=len(subjects) > 1 or subjects[0].is_plural)


def sample_captions(scene: Scene, rng: np.random.Generator, center_x: Sequence[float]) -> tuple[str, ...]:
    """Sample five different captions of a scene.

    Args:
        scene: The scene.
        rng: Random generator; it advances.
        center_x: Horizontal center of each object's bounding box, as a fraction of the image's width.
    """

    def choose(weights: Mapping[str, float]) -> str:
        # The same choice as that of rng.choice, whose checks of its arguments take most of its time.
        probabilities = np.array(list(weights.values()))
        cumulative = (probabilities / probabilities.sum()).cumsum()
        return list(weights)[int((cumulative / cumulative[-1]).searchsorted(rng.random(), side="right"))]

    captions: list[str] = []
    while len(captions) < CAPTIONS_PER_SCENE:
        caption = _write_caption(scene, center_x, choose)
        if caption not in captions:
            captions.append(caption)
    return tuple(captions)


def canonical_caption(scene: Scene, center_x: Sequence[float]) -> str:
    """Return the caption that results from the most probable choice at every point.

    Its score is approximately an upper bound for captioners.

    Args:
        scene: The scene.
        center_x: Horizontal center of each object's bounding box, as a fraction of the image's width.
    """
    return _write_caption(scene, center_x, most_probable)


def _write_caption(scene: Scene, center_x: Sequence[float], choose: Choose) -> str:
    groups = _group_objects(scene, center_x, choose)
    floor = " " + choose(FLOORS[scene.floor])
    style = _Style(
        verb=choose(VERBS),
        left_of=choose(RELATIONS["left"]),
        floor=floor,
        optional_floor=choose({floor: 0.95, "": 0.05}),
        nearest_first=_flip_coin(choose, 0.1),
    )
    templates = (_templates_for_one, _templates_for_two, _templates_for_three, _templates_for_four)[len(groups) - 1]
    sentence = choose(templates(style, *groups))
    return sentence[0].upper() + sentence[1:] + "."


def _group_objects(scene: Scene, center_x: Sequence[float], choose: Choose) -> list[_ObjectGroup]:
    """Group identical objects, write the phrase of each group, and sort groups from left to right."""
    members: dict[tuple[str, ...], list[int]] = {}
    for index, obj in enumerate(scene.objects):
        members.setdefault((obj.size, obj.texture, obj.color, obj.shape), []).append(index)

    # An annotator uses the same synonyms and attribute kinds throughout a sentence, and fewer kinds for many objects.
    words = {
        value: choose(synonyms)
        for table in (SHAPES, SIZES, TEXTURES)
        for value, synonyms in table.items()
        if len(synonyms) > 1
    }
    is_crowded = len(members) > 3
    sizes_differ = len({obj.size for obj in scene.objects}) > 1
    mention_pattern = _flip_coin(choose, 0.15 if is_crowded else 0.9)
    mention_shine = not is_crowded and _flip_coin(choose, 0.7)
    mention_size = not is_crowded and _flip_coin(choose, 0.85 if sizes_differ else 0.05)
    is_mentioned = {
        "size": mention_size,
        "striped": mention_pattern,
        "spotted": mention_pattern,
        "shiny": mention_shine,
        "matte": False,
    }
    groups = [
        _ObjectGroup(
            phrase=_noun_phrase(scene.objects[indices[0]], len(indices), words, is_mentioned),
            center_x=tuple(center_x[index] for index in indices),
            z=tuple(scene.objects[index].z for index in indices),
        )
        for indices in members.values()
    ]
    return sorted(groups, key=lambda group: sum(group.center_x) / len(group.center_x))


def _noun_phrase(obj: SceneObject, count: int, words: Mapping[str, str], is_mentioned: Mapping[str, bool]) -> str:
    values = [(obj.size, is_mentioned["size"]), (obj.texture, is_mentioned[obj.texture]), (obj.color, True)]
    adjectives = [words.get(value, value) for value, mentioned in values if mentioned]
    noun = words.get(obj.shape, obj.shape)
    if count > 1:
        return " ".join([NUMBERS[count], *adjectives, pluralize(noun)])
    article = "an" if adjectives[0][0] in "aeiou" else "a"
    return " ".join([article, *adjectives, noun])


# Each of the following functions returns all true sentences with their weights, for groups sorted from left to right.


def _templates_for_one(style: _Style, a: _ObjectGroup) -> dict[str, float]:
    templates = {
        f"{a.phrase} {style.verb_for(a)}{style.floor}": 0.2,
        f"there is nothing but {a.phrase}{style.floor}": 0.15,
    }
    if a.is_plural:
        return templates | {
            f"there are {a.phrase}{style.floor}": 0.25,
            f"{a.phrase} {style.verb_for(a)} by themselves{style.floor}": 0.4,
        }
    (x,) = a.center_x
    side = "on the left" if x < 0.35 else "on the right" if x > 0.65 else "in the middle"
    return templates | {
        f"there is {a.phrase}{style.floor}": 0.15,
        f"{a.phrase} {style.verb_for(a)} alone{style.floor}": 0.3,
        f"{a.phrase} {style.verb_for(a)}{style.floor} {side} of the picture": 0.2,
    }


def _templates_for_two(style: _Style, a: _ObjectGroup, b: _ObjectGroup) -> dict[str, float]:
    templates = _list_templates(style, a, b)
    is_left = _is_left_of([a], [b])
    if is_left:
        there = "there are" if a.is_plural else "there is"
        templates |= {
            f"{a.phrase} {style.verb_for(a)} {style.left_of} {b.phrase}{style.optional_floor}": 0.7,
            f"{b.phrase} {style.verb_for(b)} {_RIGHT_OF} {a.phrase}{style.optional_floor}": 0.1,
            f"{there} {a.phrase} {style.left_of} {b.phrase}{style.optional_floor}": 0.1,
        }
    for near, far in ((a, b), (b, a)):
        if _is_in_front_of([near], [far]):
            weight = 0.15 if is_left else 0.7
            templates |= {
                f"{near.phrase} {style.verb_for(near)} {_IN_FRONT_OF} {far.phrase}{style.optional_floor}": weight,
                f"{far.phrase} {style.verb_for(far)} {_BEHIND} {near.phrase}{style.optional_floor}": weight / 3,
            }
    return templates


def _templates_for_three(style: _Style, a: _ObjectGroup, b: _ObjectGroup, c: _ObjectGroup) -> dict[str, float]:
    templates = _list_templates(style, a, b, c)
    if _is_left_of([a], [b, c]):
        clause = f"{a.phrase} {style.verb_for(a)} {style.left_of} {b.phrase} and {c.phrase}"
        templates[clause + style.optional_floor] = 0.15
    if _is_left_of([a], [b]) and _is_left_of([b], [c]):
        clause = f"{b.phrase} {style.verb_for(b)} {_BETWEEN} {a.phrase} and {c.phrase}"
        templates[clause + style.optional_floor] = 0.15
    for near_left, near_right, far in ((a, b, c), (a, c, b), (b, c, a)):
        if _is_in_front_of([near_left, near_right], [far]):
            verb = style.verb_for(near_left, near_right)
            clause = f"{near_left.phrase} and {near_right.phrase} {verb} {_IN_FRONT_OF} {far.phrase}"
            templates[clause + style.optional_floor] = 0.15
    return templates


def _templates_for_four(
    style: _Style, a: _ObjectGroup, b: _ObjectGroup, c: _ObjectGroup, d: _ObjectGroup
) -> dict[str, float]:
    templates = _list_templates(style, a, b, c, d)
    templates[f"{a.phrase}, {b.phrase} and two other objects {style.verb_for(a, b)}{style.floor}"] = 0.1
    if _is_left_of([a, b], [c, d]):
        clause = f"{a.phrase} and {b.phrase} {style.verb_for(a, b)} {style.left_of} {c.phrase} and {d.phrase}"
        templates[clause + style.optional_floor] = 0.3
    return templates


def _list_templates(style: _Style, *groups: _ObjectGroup) -> dict[str, float]:
    """Return the sentences that list all objects without a relation."""
    ordered = sorted(groups, key=lambda group: min(group.z)) if style.nearest_first else groups
    phrases = _join_phrases(ordered)
    templates = {
        f"{phrases} {style.verb_for(*groups)}{style.floor}": 0.35,
        f"there are {phrases}{style.floor}": 0.15,
        f"{phrases}{style.floor}": 0.1,
    }
    if len(groups) > 2 and all(_is_left_of([a], [b]) for a, b in pairwise(groups)):
        templates[f"from left to right there are {_join_phrases(groups)}{style.optional_floor}"] = 0.1
    return templates


def _join_phrases(groups: Sequence[_ObjectGroup]) -> str:
    phrases = [group.phrase for group in groups]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _is_left_of(a: Sequence[_ObjectGroup], b: Sequence[_ObjectGroup]) -> bool:
    rightmost = max(x for group in a for x in group.center_x)
    return rightmost + MIN_X_DIFFERENCE < min(x for group in b for x in group.center_x)


def _is_in_front_of(a: Sequence[_ObjectGroup], b: Sequence[_ObjectGroup]) -> bool:
    return max(z for group in a for z in group.z) + MIN_Z_DIFFERENCE < min(z for group in b for z in group.z)


def _flip_coin(choose: Choose, probability: float) -> bool:
    return choose({"yes": probability, "no": 1 - probability}) == "yes"
