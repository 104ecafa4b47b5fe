"""Captions of a scene: five sentences worded as five annotators might, each of them true.

Objects that look alike share one phrase ("two small red cubes"). Phrases mostly go from left to right across
the picture, so a caption can be foreseen from the picture up to its author's tastes: which synonyms, which
attributes, which frame of sentence. A relation is told only where it clearly holds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.scenes.scene import Body, Scene

CAPTIONS_A_SCENE = 5

CLEARLY_ASIDE = 0.08
"""Least distance from left to right that is worth a word, as a fraction of the picture's width."""
CLEARLY_BEHIND = 0.8
"""Least difference in z that is worth a word, in the world's units."""

Choose = Callable[[Mapping[str, float]], str]
"""Picks one of several wordings, given with their weights."""

_SYNONYMS: dict[str, dict[str, float]] = {
    "sphere": {"ball": 0.85, "sphere": 0.15},
    "cube": {"cube": 0.85, "block": 0.15},
    "small": {"small": 0.75, "little": 0.15, "tiny": 0.1},
    "large": {"large": 0.75, "big": 0.25},
    "shiny": {"shiny": 0.8, "metallic": 0.2},
    "spotted": {"spotted": 0.8, "dotted": 0.2},
}
_FLOORS: dict[str, dict[str, float]] = {
    "wooden": {"on a wooden floor": 0.8, "on the wooden floor": 0.1, "on wooden boards": 0.1},
    "tiled": {"on a tiled floor": 0.8, "on the tiles": 0.1, "on a floor of tiles": 0.1},
    "sandy": {"on the sand": 0.8, "on sand": 0.1, "on sandy ground": 0.1},
    "grassy": {"on the grass": 0.8, "on grass": 0.1, "on a lawn": 0.1},
    "carpeted": {"on a carpet": 0.8, "on the carpet": 0.1, "on a carpeted floor": 0.1},
}
_VERBS = {"stand": 0.8, "sit": 0.1, "rest": 0.05, "be": 0.05}
_LEFT_OF = {"to the left of": 0.85, "on the left of": 0.15}
_COUNTS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Bodies that look alike, so that one phrase names them, and where they stand."""

    phrase: str
    across: tuple[float, ...]
    z: tuple[float, ...]

    @property
    def plural(self) -> bool:
        return len(self.z) > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Style:
    """What one annotator settled on before framing a sentence."""

    verb: str
    left_of: str
    floor: str
    floor_or_none: str
    nearest_first: bool
    """Lists objects by nearness instead of from left to right."""

    def do(self, *subjects: _Group) -> str:
        """Conjugate the verb."""
        plural = len(subjects) > 1 or subjects[0].plural
        if self.verb == "be":
            return "are" if plural else "is"
        return self.verb if plural else self.verb + "s"


def captions(scene: Scene, rng: np.random.Generator, across: Sequence[float]) -> tuple[str, ...]:
    """Word a scene five times, no two captions the same.

    `across` gives, body by body, the center of its box as a fraction of the picture's width from the left.
    """

    def choose(tastes: Mapping[str, float]) -> str:
        weights = np.array(list(tastes.values()))
        return list(tastes)[rng.choice(len(weights), p=weights / weights.sum())]

    told: list[str] = []
    while len(told) < CAPTIONS_A_SCENE:
        caption = _caption(scene, across, choose)
        if caption not in told:
            told.append(caption)
    return tuple(told)


def canonical_caption(scene: Scene, across: Sequence[float]) -> str:
    """Word a scene by the likeliest choice everywhere.

    A captioner that sees all and has learned the annotators' tastes says this, so it bounds fair scores.
    `across` is as in `captions`.
    """
    return _caption(scene, across, lambda tastes: max(tastes, key=lambda wording: tastes[wording]))


def _caption(scene: Scene, across: Sequence[float], choose: Choose) -> str:
    groups = _groups(scene, across, choose)
    floor = " " + choose(_FLOORS[scene.floor])
    style = _Style(
        verb=choose(_VERBS),
        left_of=choose(_LEFT_OF),
        floor=floor,
        floor_or_none=choose({floor: 0.95, "": 0.05}),
        nearest_first=_yes(choose, 0.1),
    )
    frames = (_frames_of_one, _frames_of_two, _frames_of_three, _frames_of_four)[len(groups) - 1]
    sentence = choose(frames(style, *groups))
    return sentence[0].upper() + sentence[1:] + "."


def _groups(scene: Scene, across: Sequence[float], choose: Choose) -> list[_Group]:
    """Group bodies that look alike, name each group, and order groups from left to right by their means."""
    members: dict[tuple[str, ...], list[int]] = {}
    for place, body in enumerate(scene.bodies):
        members.setdefault((body.size, body.texture, body.color, body.shape), []).append(place)

    # An annotator keeps to one habit through a sentence, and says less of each object where there are many.
    words = {name: choose(tastes) for name, tastes in _SYNONYMS.items()}
    crowded = len(members) > 3
    sizes_differ = len({body.size for body in scene.bodies}) > 1
    pattern, shine = _yes(choose, 0.15 if crowded else 0.9), not crowded and _yes(choose, 0.7)
    said = {
        "size": not crowded and _yes(choose, 0.85 if sizes_differ else 0.05),
        "striped": pattern,
        "spotted": pattern,
        "shiny": shine,
        "matte": False,
    }
    groups = [
        _Group(
            phrase=_phrase(scene.bodies[places[0]], len(places), words, said),
            across=tuple(across[place] for place in places),
            z=tuple(scene.bodies[place].z for place in places),
        )
        for places in members.values()
    ]
    return sorted(groups, key=lambda group: sum(group.across) / len(group.across))


def _phrase(body: Body, count: int, words: Mapping[str, str], said: Mapping[str, bool]) -> str:
    sayings = [(body.size, said["size"]), (body.texture, said[body.texture]), (body.color, True)]
    described = [words.get(name, name) for name, is_said in sayings if is_said]
    noun = words.get(body.shape, body.shape)
    if count > 1:
        return " ".join([_COUNTS[count], *described, noun + "s"])
    article = "an" if described[0][0] in "aeiou" else "a"
    return " ".join([article, *described, noun])


# Each of these gives every sentence of the annotator's that is true, with the weight of its frame.
# Groups come from left to right.


def _frames_of_one(style: _Style, a: _Group) -> dict[str, float]:
    frames = {
        f"{a.phrase} {style.do(a)}{style.floor}": 0.2,
        f"there is nothing but {a.phrase}{style.floor}": 0.15,
    }
    if a.plural:
        return frames | {
            f"there are {a.phrase}{style.floor}": 0.25,
            f"{a.phrase} {style.do(a)} by themselves{style.floor}": 0.4,
        }
    (at,) = a.across
    side = "on the left" if at < 0.35 else "on the right" if at > 0.65 else "in the middle"
    return frames | {
        f"there is {a.phrase}{style.floor}": 0.15,
        f"{a.phrase} {style.do(a)} alone{style.floor}": 0.3,
        f"{a.phrase} {style.do(a)}{style.floor} {side} of the picture": 0.2,
    }


def _frames_of_two(style: _Style, a: _Group, b: _Group) -> dict[str, float]:
    frames = _lists(style, a, b)
    aside = _left([a], [b])
    if aside:
        there = "there are" if a.plural else "there is"
        frames |= {
            f"{a.phrase} {style.do(a)} {style.left_of} {b.phrase}{style.floor_or_none}": 0.7,
            f"{b.phrase} {style.do(b)} to the right of {a.phrase}{style.floor_or_none}": 0.1,
            f"{there} {a.phrase} {style.left_of} {b.phrase}{style.floor_or_none}": 0.1,
        }
    for near, far in ((a, b), (b, a)):
        if _before([near], [far]):
            weight = 0.15 if aside else 0.7
            frames |= {
                f"{near.phrase} {style.do(near)} in front of {far.phrase}{style.floor_or_none}": weight,
                f"{far.phrase} {style.do(far)} behind {near.phrase}{style.floor_or_none}": weight / 3,
            }
    return frames


def _frames_of_three(style: _Style, a: _Group, b: _Group, c: _Group) -> dict[str, float]:
    frames = _lists(style, a, b, c)
    if _left([a], [b, c]):
        told = f"{a.phrase} {style.do(a)} {style.left_of} {b.phrase} and {c.phrase}{style.floor_or_none}"
        frames[told] = 0.15
    if _left([a], [b]) and _left([b], [c]):
        told = f"{b.phrase} {style.do(b)} between {a.phrase} and {c.phrase}{style.floor_or_none}"
        frames[told] = 0.15
    for one, other, far in ((a, b, c), (a, c, b), (b, c, a)):
        if _before([one, other], [far]):
            told = f"{one.phrase} and {other.phrase} {style.do(one, other)} in front of {far.phrase}"
            frames[told + style.floor_or_none] = 0.15
    return frames


def _frames_of_four(style: _Style, a: _Group, b: _Group, c: _Group, d: _Group) -> dict[str, float]:
    frames = _lists(style, a, b, c, d)
    frames[f"{a.phrase}, {b.phrase} and two other objects {style.do(a, b)}{style.floor}"] = 0.1
    if _left([a, b], [c, d]):
        told = f"{a.phrase} and {b.phrase} {style.do(a, b)} {style.left_of} {c.phrase} and {d.phrase}"
        frames[told + style.floor_or_none] = 0.3
    return frames


def _lists(style: _Style, *groups: _Group) -> dict[str, float]:
    listed = _listed(sorted(groups, key=lambda group: min(group.z)) if style.nearest_first else groups)
    frames = {
        f"{listed} {style.do(*groups)}{style.floor}": 0.35,
        f"there are {listed}{style.floor}": 0.15,
        f"{listed}{style.floor}": 0.1,
    }
    if len(groups) > 2 and all(_left([a], [b]) for a, b in pairwise(groups)):
        frames[f"from left to right there are {_listed(groups)}{style.floor_or_none}"] = 0.1
    return frames


def _listed(groups: Sequence[_Group]) -> str:
    phrases = [group.phrase for group in groups]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _left(these: Sequence[_Group], those: Sequence[_Group]) -> bool:
    return max(x for group in these for x in group.across) + CLEARLY_ASIDE < min(
        x for group in those for x in group.across
    )


def _before(these: Sequence[_Group], those: Sequence[_Group]) -> bool:
    return max(z for group in these for z in group.z) + CLEARLY_BEHIND < min(z for group in those for z in group.z)


def _yes(choose: Choose, weight: float) -> bool:
    return choose({"yes": weight, "no": 1 - weight}) == "yes"
