"""Scores for images with annotated objects: correct names and relations, and attention on the named objects."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from pipeline.captions.records import AnnotatedObject, Record
from pipeline.generation.caption_io import GeneratedCaptions
from pipeline.metrics import grounding
from pipeline.metrics.bootstrap import Resampling, Table, mean, paired_difference
from pipeline.metrics.corpus import Words
from pipeline.metrics.grounding import Box
from pipeline.scenes.caption_checker import (
    count_groups,
    count_plurals,
    count_relations,
    find_mentions,
    find_relations,
    matching_objects,
    names_correctly,
)

NAMES_PROTOCOL = [
    "accuracy: fraction of captions in which every mention is correct, among captions that name an object",
    "correct mention: the image has as many objects of the named color and shape as the mention counts",
]
RELATIONS_PROTOCOL = ["accuracy: fraction of the stated spatial relations that hold between the named objects"]
COUNTS_PROTOCOL = [
    "accuracy: fraction of the groups of objects of one color and shape whose number the caption states",
    "plural_accuracy: fraction of the mentions of two or more objects with the right number",
]
ATTENTION_PROTOCOL = [
    *(f"{key}: {value}" for key, value in grounding.PROTOCOL.items()),
    "boxes of a shape, color, size or texture: of all objects that its phrase can refer to",
    "boxes of a relation: of all objects that its subjects and its objects can refer to",
    "all: shapes, colors, sizes and textures; words that refer to no object in the image are left out",
]


@dataclass(frozen=True, kw_only=True)
class GroundedWord:
    """A word of a caption that refers to objects in the image."""

    position: int
    """Index of the word in the caption."""
    kind: str
    """`shape`, `color`, `size`, `texture` or `relation`."""
    boxes: tuple[Box, ...]
    """Boxes of the objects."""


@dataclass(frozen=True, kw_only=True)
class _GroundingScores:
    """Grounding of one word's attention."""

    peak_in_box: float
    """1 if the center of the most attended region lies in a box, else 0."""
    peak_by_chance: float
    """`peak_in_box` of a random region, on average."""
    mass_in_box: float
    """Fraction of the attention in the boxes."""
    mass_by_chance: float
    """`mass_in_box` of uniform attention."""


class _Statements(NamedTuple):
    """Statements of one image's caption: how many of each kind are right, and how many there are."""

    names: tuple[int, int]
    """1 if every mention is correct, of 1 caption that names an object; (0, 0) if it names none."""
    relations: tuple[int, int]
    """Spatial relations that hold, of those that the caption states."""
    counts: tuple[int, int]
    """Groups whose number the caption states, of the groups of objects of one color and shape in the image."""
    plurals: tuple[int, int]
    """Mentions with the right number, of the mentions of two or more objects."""


@dataclass(frozen=True, kw_only=True)
class _ImageScores:
    """Scores of one image's caption."""

    statements: _Statements
    grounding: Sequence[tuple[str, _GroundingScores]]
    """Kind and grounding of each word that refers to objects."""


def score_scenes(
    records: Sequence[Record],
    generated: Mapping[int, GeneratedCaptions],
    resampling: Resampling,
    visible_objects: Callable[[Record], Sequence[AnnotatedObject]] = attrgetter("objects"),
    trained_captions: Mapping[int, Words] | None = None,
) -> dict[str, Any]:
    """Score the captions of the images with annotated objects.

    Args:
        records: Records of the split.
        generated: Generated captions by image id.
        resampling: Bootstrap settings of the intervals.
        visible_objects: Returns the objects of an image, with boxes relative to the part that the grid covers; by
            default, it covers the whole image.
        trained_captions: Words of the captions before refinement, by image id; None if the model is not refined.

    Returns:
        JSON values: scores of all images and of each subset, with their protocol. With `trained_captions`, also
        `refinement`: for names, relations and counts, the rates `trained` and `refined`, their paired `difference`, its
        95% `interval` (None if a bootstrap sample has no such statement), and whether it is `significant`; None if the
        captions before or after have no such statement. If no record has objects, only `num_images` (0).
    """
    annotated = [record for record in records if record.objects]
    if not annotated:
        return {"num_images": 0}
    images = [_score_image(record, generated[record.image_id], visible_objects(record)) for record in annotated]
    rows_by_subset: dict[str, list[int]] = defaultdict(list)
    for row, record in enumerate(annotated):
        if record.subset is not None:
            rows_by_subset[record.subset].append(row)
    subsets = sorted(rows_by_subset.items())
    scores: dict[str, Any] = {
        "protocol": {
            "names": NAMES_PROTOCOL,
            "relations": RELATIONS_PROTOCOL,
            "counts": COUNTS_PROTOCOL,
            "attention": ATTENTION_PROTOCOL,
        },
        **_summarize(images),
    }
    if subsets:
        scores["subsets"] = {subset: _summarize([images[row] for row in rows]) for subset, rows in subsets}
    if trained_captions is not None:
        trained = np.array(
            [_check_statements(trained_captions[record.image_id], record.objects) for record in annotated]
        )
        refined = np.array([image.statements for image in images])
        differences = _compare_statements(trained, refined, resampling)
        if subsets:
            differences["subsets"] = {
                subset: _compare_statements(trained[rows], refined[rows], resampling) for subset, rows in subsets
            }
        scores["refinement"] = differences
    return scores


def _score_image(
    record: Record, caption: GeneratedCaptions, visible_objects: Sequence[AnnotatedObject]
) -> _ImageScores:
    words = find_grounded_words(caption.words, visible_objects)
    return _ImageScores(
        statements=_check_statements(caption.words, record.objects),
        grounding=[(word.kind, _score_grounding(caption.attention[word.position], word.boxes)) for word in words],
    )


def _check_statements(words: Words, objects: Sequence[AnnotatedObject]) -> _Statements:
    names_correct = names_correctly(words, objects)
    return _Statements(
        names=(0, 0) if names_correct is None else (int(names_correct), 1),
        relations=count_relations(words, objects),
        counts=count_groups(words, objects),
        plurals=count_plurals(words, objects),
    )


def _score_grounding(attention: grounding.Attention, boxes: Sequence[Box]) -> _GroundingScores:
    return _GroundingScores(
        peak_in_box=float(grounding.peak_in_boxes(attention, boxes)),
        peak_by_chance=grounding.peak_by_chance(boxes, attention.shape),
        mass_in_box=grounding.mass_in_boxes(attention, boxes),
        mass_by_chance=grounding.mass_by_chance(boxes),
    )


def _summarize(images: Sequence[_ImageScores]) -> dict[str, Any]:
    attention: dict[str, list[_GroundingScores]] = defaultdict(list)
    for image in images:
        for kind, scores in image.grounding:
            attention[kind].append(scores)
    kinds = sorted(attention)
    object_words = [scores for kind in kinds if kind != "relation" for scores in attention[kind]]
    return {
        "num_images": len(images),
        **_summarize_statements([image.statements for image in images]),
        "attention": {
            "all": _mean_scores(object_words),
            **{kind: _mean_scores(attention[kind]) for kind in kinds},
        },
    }


def _summarize_statements(captions: Sequence[_Statements]) -> dict[str, Any]:
    names, relations, counts, plurals = np.array(captions).sum(axis=0).tolist()
    return {
        "names": {"num_captions_without_names": len(captions) - names[1], "accuracy": _rate(*names)},
        "relations": {"num_relations": relations[1], "accuracy": _rate(*relations)},
        "counts": {
            "num_groups": counts[1],
            "accuracy": _rate(*counts),
            "num_plurals": plurals[1],
            "plural_accuracy": _rate(*plurals),
        },
    }


def _compare_statements(trained: Table, refined: Table, resampling: Resampling) -> dict[str, Any]:
    """Compare the statements [N, 4, 2] of the captions before and after refinement, under the names of the scores."""
    names, relations, counts, plurals = (
        _compare_rates(trained[:, kind], refined[:, kind], resampling) for kind in range(len(_Statements._fields))
    )
    return {
        "names": {"accuracy": names},
        "relations": {"accuracy": relations},
        "counts": {"accuracy": counts, "plural_accuracy": plurals},
    }


def _compare_rates(trained: Table, refined: Table, resampling: Resampling) -> dict[str, Any] | None:
    """Compare a rate before and after refinement; return None if the captions before or after have no statement."""
    before, after = trained.sum(axis=0), refined.sum(axis=0)
    if not (before[1] and after[1]):
        return None
    with np.errstate(invalid="ignore"):  # samples without such a statement
        interval = paired_difference(refined, trained, mean, resampling)
    return {
        "trained": _rate(*before.tolist()),
        "refined": _rate(*after.tolist()),
        **interval.describe_difference(),
    }


def find_grounded_words(words: Sequence[str], objects: Sequence[AnnotatedObject]) -> list[GroundedWord]:
    """Find the words of a caption that refer to objects in the image, as `ATTENTION_PROTOCOL` defines it.

    Args:
        words: The caption.
        objects: Annotated objects of the image.
    """
    grounded = []
    for mention in find_mentions(words):
        if indices := matching_objects(mention, objects):
            boxes = tuple(objects[index].box for index in indices)
            grounded += [
                GroundedWord(position=position, kind=kind, boxes=boxes) for kind, position in mention.positions.items()
            ]
    for relation in find_relations(words):
        object_indices = [
            {index for mention in side for index in matching_objects(mention, objects)}
            for side in (relation.subjects, relation.landmarks)
        ]
        if all(object_indices):
            boxes = tuple(objects[index].box for index in sorted(set.union(*object_indices)))
            grounded.append(GroundedWord(position=relation.position, kind="relation", boxes=boxes))
    return grounded


def _mean_scores(scores: Sequence[_GroundingScores]) -> dict[str, float | int | None]:
    names = [field.name for field in fields(_GroundingScores)]
    if not scores:
        return {"num_words": 0, **dict.fromkeys(names)}
    means = np.mean([[getattr(word, name) for name in names] for word in scores], axis=0).round(6).tolist()
    return {"num_words": len(scores), **dict(zip(names, means, strict=True))}


def _rate(count: int, total: int) -> float | None:
    return round(count / total, 6) if total else None
