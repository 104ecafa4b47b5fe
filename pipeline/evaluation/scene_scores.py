"""What can be scored only where it is known what an image shows: right names, and attention on the thing named."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.captions.records import AnnotatedObject, Record
from pipeline.generation.caption_io import GeneratedCaptions
from pipeline.metrics import grounding
from pipeline.metrics.grounding import Box
from pipeline.scenes.caption_checker import (
    count_relations,
    find_mentions,
    find_relations,
    matching_objects,
    names_correctly,
)

NAMES_PROTOCOL = [
    "share of captions, among those that name anything, in which every mention is right",
    "a mention is right where as many things as it counts have the color and shape that it names",
]
RELATIONS_PROTOCOL = ["share of the statements of place that hold between the things named"]
ATTENTION_PROTOCOL = [
    *(f"{key}: {said}" for key, said in grounding.PROTOCOL.items()),
    "boxes of a shape, color, size or texture: of the things that its phrase can mean",
    "boxes of a relation: of the things that its subjects and its objects can mean, taken together",
    "all: shapes, colors, sizes and textures; words that speak of nothing shown do not count",
]


@dataclass(frozen=True, kw_only=True)
class Grounded:
    """A word of a caption that speaks of things which the image shows."""

    position: int
    """Its index in the caption."""
    kind: str
    """`shape`, `color`, `size`, `texture` or `relation`."""
    boxes: tuple[Box, ...]
    """Where these things are."""


def score_scenes(
    records: Sequence[Record], generated: Mapping[int, GeneratedCaptions], grid: tuple[int, int]
) -> dict[str, Any]:
    """Score the generated captions of those records whose things are known; numbers with their protocol.

    Where no record has things, only their number, 0, is returned.
    """
    known = [record for record in records if record.objects]
    if not known:
        return {"images": 0}
    whole = _score(known, generated, grid)
    subsets = sorted({record.subset for record in known if record.subset is not None})
    apart = {
        subset: _score([record for record in known if record.subset == subset], generated, grid) for subset in subsets
    }
    protocol = {"names": NAMES_PROTOCOL, "relations": RELATIONS_PROTOCOL, "attention": ATTENTION_PROTOCOL}
    return {"protocol": protocol, **whole, **({"subsets": apart} if apart else {})}


def _score(
    records: Sequence[Record], generated: Mapping[int, GeneratedCaptions], grid: tuple[int, int]
) -> dict[str, Any]:
    verdicts = [names_correctly(generated[record.image_id].words, record.objects) for record in records]
    stated = [count_relations(generated[record.image_id].words, record.objects) for record in records]
    statements = sum(total for _, total in stated)
    looks = _looks(records, generated, grid)
    things_named = [look for kind in looks.keys() - {"relation"} for look in looks[kind]]
    return {
        "images": len(records),
        "names": {
            "captions_naming_nothing": verdicts.count(None),
            "all_right": _share(verdicts.count(True), len(verdicts) - verdicts.count(None)),
        },
        "relations": {"stated": statements, "right": _share(sum(right for right, _ in stated), statements)},
        "attention": {
            "all": _summary(things_named),
            **{kind: _summary(looks[kind]) for kind in sorted(looks)},
        },
    }


def grounded_words(words: Sequence[str], things: Sequence[AnnotatedObject]) -> list[Grounded]:
    """Find the words of a caption that speak of things which the image shows, by `ATTENTION_PROTOCOL`."""
    found = []
    for mention in find_mentions(words):
        if places := matching_objects(mention, things):
            boxes = tuple(things[place].box for place in places)
            found += [Grounded(position=at, kind=kind, boxes=boxes) for kind, at in mention.positions.items()]
    for said in find_relations(words):
        sides = [
            {place for one in side for place in matching_objects(one, things)}
            for side in (said.subjects, said.landmarks)
        ]
        if all(sides):
            boxes = tuple(things[place].box for place in sorted(set.union(*sides)))
            found.append(Grounded(position=said.position, kind="relation", boxes=boxes))
    return found


def _looks(
    records: Sequence[Record], generated: Mapping[int, GeneratedCaptions], grid: tuple[int, int]
) -> dict[str, list[tuple[float, ...]]]:
    """By kind of word, for each word: whether the peak is in a box, the same by chance, mass in boxes, by chance."""
    looks: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for record in records:
        caption = generated[record.image_id]
        for word in grounded_words(caption.words, record.objects):
            attention = caption.attention[word.position].reshape(grid)
            looks[word.kind].append(
                (
                    float(grounding.peak_in_boxes(attention, word.boxes)),
                    grounding.peak_by_chance(word.boxes, grid),
                    grounding.mass_in_boxes(attention, word.boxes),
                    grounding.mass_by_chance(word.boxes),
                )
            )
    return looks


def _summary(looks: Sequence[tuple[float, ...]]) -> dict[str, float | int]:
    if not looks:
        return {"words": 0}
    means = np.mean(looks, axis=0).round(6).tolist()
    names = ("peak_in_box", "chance", "mass_in_box", "mass_by_chance")
    return {"words": len(looks), **dict(zip(names, means, strict=True))}


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None
