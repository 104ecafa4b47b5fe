"""All scores of generated captions against references, each with its protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation import bleu, cider, meteor, rouge
from pipeline.evaluation.corpus import Words


def score_captions(
    hypotheses: Mapping[int, Words],
    references: Mapping[int, Sequence[Words]],
    subsets: Mapping[str, Sequence[int]],
    tokens_protocol: str,
    with_meteor: bool,
) -> dict[str, Any]:
    """Score captions of images against their references, over all images and over each subset of them.

    Returns plain values: `{"BLEU-4": {"value": 0.31, "protocol": [...]}, ...}`, subsets under their name. Subsets use
    the document frequencies of all images. Raises `ValueError` where an image has no reference.
    """
    image_ids = sorted(hypotheses)
    proposed = [hypotheses[image_id] for image_id in image_ids]
    wanted = [references[image_id] for image_id in image_ids]
    counts = bleu.bleu_counts(proposed, wanted)
    ciders = cider.cider(proposed, wanted)
    rouges = rouge.rouge_l(proposed, wanted)

    def values(rows: NDArray[np.intp]) -> dict[str, float]:
        return {
            **{
                f"BLEU-{order}": float(value)
                for order, value in enumerate(bleu.bleu(counts[rows].sum(axis=0)), start=1)
            },
            "CIDEr-D": float(ciders.cider_d[rows].mean()),
            "CIDEr": float(ciders.cider[rows].mean()),
            "ROUGE-L": float(rouges[rows].mean()),
        }

    shared = [f"tokens: {tokens_protocol}", f"references: {_reference_numbers(wanted)} an image"]
    protocols: dict[str, Mapping[str, object]] = {
        **{f"BLEU-{order}": bleu.PROTOCOL for order in range(1, bleu.ORDERS + 1)},
        "CIDEr-D": cider.PROTOCOL,
        "CIDEr": cider.PROTOCOL,
        "ROUGE-L": rouge.PROTOCOL,
    }
    scores: dict[str, Any] = {"images": len(image_ids)}
    for name, value in values(np.arange(len(image_ids))).items():
        protocol = [f"{key}: {said}" for key, said in protocols[name].items()]
        scores[name] = {"value": round(value, 6), "protocol": [*protocol, *shared]}
    scores["METEOR"] = _meteor(proposed, wanted, shared, with_meteor)
    scores["captions"] = {
        "distinct": len({tuple(words) for words in proposed}),
        "words_a_caption": round(float(np.mean([len(words) for words in proposed])), 3),
    }
    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    for subset, members in subsets.items():
        rows = np.array([row_of[image_id] for image_id in members])
        own = {name: {"value": round(value, 6)} for name, value in values(rows).items()}
        scores[subset] = {"images": len(rows), **own}
    return scores


def _meteor(
    proposed: Sequence[Words], wanted: Sequence[Sequence[Words]], shared: list[str], asked: bool
) -> dict[str, Any]:
    if not asked:
        return {"unavailable": ["evaluate.meteor is false in params.yaml"]}
    found = meteor.meteor(proposed, wanted)
    if isinstance(found, meteor.Unavailable):
        return {"unavailable": [found.reason]}
    protocol = [f"{key}: {said}" for key, said in meteor.PROTOCOL.items()]
    return {"value": round(found.corpus, 6), "protocol": [*protocol, *shared]}


def _reference_numbers(wanted: Sequence[Sequence[Words]]) -> str:
    numbers = sorted({len(captions) for captions in wanted})
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
