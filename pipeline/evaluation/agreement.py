"""Human agreement: each reference is scored against the other references of its image.

A human caption has one reference fewer than the generated caption, and fewer references lower BLEU. So the generated
caption is also scored against the remaining references in each round, and both are compared on the same references.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from pipeline.metrics.bootstrap import Resampling, Table, paired_difference, score_interval
from pipeline.metrics.caption_scores import CORPUS_SCORES, compute_metrics
from pipeline.metrics.cider import CiderScores, SentenceIndex
from pipeline.metrics.corpus import LIBRARY, Corpus
from pipeline.metrics.java import UnavailableError, require_english
from pipeline.metrics.meteor import meteor_counts

PROTOCOL = (
    "human: each reference of an image is scored against its other references",
    "model: the generated caption is scored against the same remaining references, each time",
    "rounds: the first reference of every image is left out, then the second, and so on; images with fewer start over",
    "images with a single reference are left out",
    "average: counts of BLEU and METEOR are summed over all rounds, other scores averaged; the rest as in scores.json",
    f"library: {LIBRARY}",
)


def human_agreement(corpus: Corpus, with_meteor: bool, resampling: Resampling) -> dict[str, Any]:
    """Score humans and the model against the same references.

    Args:
        corpus: Generated captions with their references.
        with_meteor: Compute METEOR too, which needs Java.
        resampling: Bootstrap settings of the intervals.

    Returns:
        JSON values. For each metric but SPICE, `{"human": [0.2, 0.1, 0.3], "model": [...], "model - human": [...]}`:
        value, lower and upper end of the interval of both scores and of their paired difference. If METEOR is
        unavailable, the protocol has the reason. If no image has two references, only `num_images` (0) and the
        protocol.
    """
    num_images = sum(len(captions) > 1 for captions in corpus.references)
    if not num_images:
        return {"num_images": 0, "protocol": list(PROTOCOL)}
    human, model = _leave_one_out(corpus)
    human_tables, model_tables = _sum_tables(human), _sum_tables(model)
    unavailable = []
    if with_meteor:
        try:
            require_english("METEOR", corpus.tokenization.language)
            human_tables["METEOR"], model_tables["METEOR"] = _meteor_tables([human, model])
        except UnavailableError as error:
            unavailable.append(f"METEOR is missing: {error}")
    scores = {}
    for metric, score in CORPUS_SCORES.items():
        if metric in human_tables:
            scores[metric] = {
                "human": score_interval(human_tables[metric], score, resampling).rounded(),
                "model": score_interval(model_tables[metric], score, resampling).rounded(),
                "model - human": paired_difference(
                    model_tables[metric], human_tables[metric], score, resampling
                ).rounded(),
            }
    protocol = [*PROTOCOL, *unavailable, *human[0].corpus.protocol, resampling.protocol]
    return {"num_images": num_images, **scores, "protocol": protocol}


@dataclass(frozen=True, kw_only=True)
class _Round:
    """The corpus of a round, in which one reference of each image is left out."""

    corpus: Corpus
    cider_scores: CiderScores


def _leave_one_out(corpus: Corpus) -> tuple[list[_Round], list[_Round]]:
    """Return the rounds of humans, in which the left-out references are scored, and those of the model.

    Images with a single reference are left out.
    """
    rows = [row for row, captions in enumerate(corpus.references) if len(captions) > 1]
    captions = [[corpus.hypotheses[row], *corpus.references[row]] for row in rows]  # the generated one, then references
    num_captions = np.array([len(image) for image in captions])  # [N]
    first_caption = np.cumsum(num_captions) - num_captions  # [N]
    is_reference = np.ones(num_captions.sum(), dtype=bool)  # of all captions
    is_reference[first_caption] = False
    # The n-grams of all captions are counted once for all rounds.
    sentences = SentenceIndex(list(chain.from_iterable(captions)), np.repeat(np.arange(len(rows)), num_captions))
    human: list[_Round] = []
    model: list[_Round] = []
    for round_index in range(num_captions.max() - 1):
        left_out = 1 + round_index % (num_captions - 1)  # [N]
        is_scored = is_reference.copy()
        is_scored[first_caption + left_out] = False
        references = tuple(
            [*image[1:index], *image[index + 1 :]] for image, index in zip(captions, left_out.tolist(), strict=True)
        )
        for rounds, hypothesis in ((human, left_out), (model, np.zeros_like(left_out))):
            scored = zip(captions, hypothesis.tolist(), strict=True)
            rounds.append(
                _Round(
                    corpus=Corpus(
                        image_ids=tuple(corpus.image_ids[row] for row in rows),
                        hypotheses=tuple(image[index] for image, index in scored),
                        references=references,
                        tokenization=corpus.tokenization,
                    ),
                    cider_scores=sentences.score(first_caption + hypothesis, np.flatnonzero(is_scored)),
                )
            )
    return human, model


def _sum_tables(rounds: Sequence[_Round]) -> dict[str, Table]:
    """Sum the tables of all rounds, by metric, without METEOR. A metric must be defined in every round."""
    tables_by_round = [
        compute_metrics(scored.corpus, with_meteor=False, with_spice=False, cider_scores=scored.cider_scores).tables
        for scored in rounds
    ]
    names = [name for name in tables_by_round[0] if all(name in tables for tables in tables_by_round)]
    return {name: np.sum([tables[name] for tables in tables_by_round], axis=0) for name in names}


def _meteor_tables(systems: Sequence[Sequence[_Round]]) -> list[Table]:
    """Compute the METEOR table of each system, summed over its rounds, with a single run of Java."""
    corpora = [scored.corpus for rounds in systems for scored in rounds]
    hypotheses = [words for corpus in corpora for words in corpus.hypotheses]
    references = [captions for corpus in corpora for captions in corpus.references]
    counts = meteor_counts(hypotheses, references)
    # [systems, rounds, N, D], summed over rounds
    tables: Table = counts.reshape(len(systems), len(systems[0]), -1, counts.shape[1]).sum(axis=1)
    return list(tables)
