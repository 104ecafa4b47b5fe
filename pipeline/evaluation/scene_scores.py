"""What can be scored only where it is known what an image shows: right names, and attention on the thing named."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.captions.records import Record, Thing
from pipeline.decoder.generated import Generated
from pipeline.evaluation import grounding
from pipeline.scenes.judge import matches, mentions, names_rightly, relations

NAMES_PROTOCOL = [
    "share of captions, among those that name anything, in which every mention is right",
    "a mention is right where as many things as it counts have the colour and shape that it names",
]
RELATIONS_PROTOCOL = ["share of the statements of place that hold between the things named"]
ATTENTION_PROTOCOL = [
    "for each word that names a kind of a thing shown: whether the region of most attention has its centre in the box "
    "of a thing that the phrase can mean, and what share of attention lies in such boxes",
    "chance: share of region centres in those boxes",
]


def score_scenes(
    records: Sequence[Record], generated: Mapping[int, Generated], grid: tuple[int, int]
) -> dict[str, Any]:
    """Score the generated captions of those records whose things are known; numbers with their protocol.

    Where no record has things, only their number, 0, is returned.
    """
    known = [record for record in records if record.things]
    if not known:
        return {"images": 0}
    whole = _score(known, generated, grid)
    subsets = sorted({record.subset for record in known if record.subset is not None})
    apart = {
        subset: _score([record for record in known if record.subset == subset], generated, grid) for subset in subsets
    }
    protocol = {"names": NAMES_PROTOCOL, "relations": RELATIONS_PROTOCOL, "attention": ATTENTION_PROTOCOL}
    return {"protocol": protocol, **whole, **({"subsets": apart} if apart else {})}


def _score(records: Sequence[Record], generated: Mapping[int, Generated], grid: tuple[int, int]) -> dict[str, Any]:
    verdicts = [names_rightly(generated[record.image_id].words, record.things) for record in records]
    stated = [relations(generated[record.image_id].words, record.things) for record in records]
    statements = sum(total for _, total in stated)
    looks = _looks(records, generated, grid)
    everything = [look for kind in looks.values() for look in kind]
    return {
        "images": len(records),
        "names": {
            "captions_naming_nothing": verdicts.count(None),
            "all_right": _share(verdicts.count(True), len(verdicts) - verdicts.count(None)),
        },
        "relations": {"stated": statements, "right": _share(sum(right for right, _ in stated), statements)},
        "attention": {
            "all": _summary(everything),
            **{kind: _summary(looks[kind]) for kind in sorted(looks)},
        },
    }


def _looks(
    records: Sequence[Record], generated: Mapping[int, Generated], grid: tuple[int, int]
) -> dict[str, list[tuple[float, float, float]]]:
    """By kind of word, for each word that names a thing shown: (peak in a box, mass in boxes, chance)."""
    looks = defaultdict(list)
    for record in records:
        caption = generated[record.image_id]
        for mention in mentions(caption.words):
            meant = [record.things[place] for place in matches(mention, record.things)]
            if not meant:
                continue
            for kind, place in mention.positions.items():
                looks[kind].append(_look(caption.attention[place].reshape(grid), meant))
    return looks


def _look(attention: NDArray[np.float16], meant: Sequence[Thing]) -> tuple[float, float, float]:
    shape = (attention.shape[0], attention.shape[1])
    boxes = [thing.box for thing in meant]
    inside = max(grounding.peak_in_box(attention, box) for box in boxes)
    mass = min(1.0, sum(grounding.mass_in_box(attention, box) for box in boxes))
    return float(inside), mass, min(1.0, sum(grounding.chance(box, shape) for box in boxes))


def _summary(looks: Sequence[tuple[float, float, float]]) -> dict[str, float | int | None]:
    if not looks:
        return {"words": 0}
    peak, mass, chance = (float(np.mean(values)) for values in zip(*looks, strict=True))
    return {
        "words": len(looks),
        "peak_in_box": round(peak, 6),
        "mass_in_box": round(mass, 6),
        "chance": round(chance, 6),
        "peak_over_chance": round(peak / chance, 3) if chance else None,
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None
