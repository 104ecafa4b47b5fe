"""How well people agree: each reference scored against the other references of its image.

A model is scored against all references of an image, a person against one less, which alone lowers BLEU. So the model's
caption is scored against each such remainder as well: beside the person's, and against the very same captions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.metrics.bootstrap import Interval, Resampling, Table, paired_difference, score_interval
from pipeline.metrics.caption_scores import CORPUS_SCORES, measure
from pipeline.metrics.corpus import LIBRARY, Corpus, Words
from pipeline.metrics.java import UnavailableError
from pipeline.metrics.meteor import meteor_counts

PROTOCOL = (
    "human: each reference of an image against its others; model: its caption against those same others, each time",
    "the first reference of all images is left out, then the second, and so on; images with fewer begin again",
    "images with a single reference play no part",
    "counts of BLEU and METEOR are added up over all that, other scores averaged; all else is as scores.json says",
    f"library: {LIBRARY}",
)


def agreement(corpus: Corpus, with_meteor: bool, resampling: Resampling) -> dict[str, Any]:
    """Score people and the model against the same references, as plain values to write down.

    Returns for each score but SPICE, and METEOR where it is asked for and can be had, value, low and high end of the
    interval of either and of their paired difference: `{"BLEU-4": {"human": [0.2, 0.1, 0.3], "model": [...],
    "model - human": [...]}, ...}`; the protocol says why METEOR could not be had. Where no image has two references,
    only the number of images, 0, is returned.
    """
    images = sum(len(captions) > 1 for captions in corpus.references)
    if not images:
        return {"images": 0, "protocol": list(PROTOCOL)}
    human = _left_out(corpus, lambda row, left_out: corpus.references[row][left_out])
    model = _left_out(corpus, lambda row, _: corpus.hypotheses[row])
    tables = _tables(human), _tables(model)
    missing = []
    if with_meteor:
        try:
            tables[0]["METEOR"], tables[1]["METEOR"] = _meteor_tables([human, model])
        except UnavailableError as error:
            missing.append(f"METEOR is missing: {error}")
    scores = {}
    for name in [name for name in CORPUS_SCORES if name in tables[0]]:
        person, decoder, of_sums = tables[0][name], tables[1][name], CORPUS_SCORES[name]
        scores[name] = {
            "human": _plain(score_interval(person, of_sums, resampling)),
            "model": _plain(score_interval(decoder, of_sums, resampling)),
            "model - human": _plain(paired_difference(decoder, person, of_sums, resampling)),
        }
    return {"images": images, **scores, "protocol": [*PROTOCOL, *missing, *human[0].protocol, resampling.protocol]}


def _left_out(corpus: Corpus, caption: Callable[[int, int], Words]) -> list[Corpus]:
    """The corpora of the images with several references, in which the first is left out, the second, and so on.

    An image begins again at its first when it has no further one. `caption` gives what is scored of an image, by its
    row, while one of its references, by its place, is left out.
    """
    rows = [row for row, captions in enumerate(corpus.references) if len(captions) > 1]
    found = []
    for number in range(max(len(corpus.references[row]) for row in rows)):
        left_out = {row: number % len(corpus.references[row]) for row in rows}
        found.append(
            Corpus(
                image_ids=tuple(corpus.image_ids[row] for row in rows),
                hypotheses=tuple(caption(row, place) for row, place in left_out.items()),
                references=tuple(
                    [*corpus.references[row][:place], *corpus.references[row][place + 1 :]]
                    for row, place in left_out.items()
                ),
                tokens=corpus.tokens,
            )
        )
    return found


def _tables(parts: Sequence[Corpus]) -> dict[str, Table]:
    """By the name of a score its table, added up over the parts; METEOR's is not among them."""
    measured = [measure(part, with_meteor=False, with_spice=False).tables for part in parts]
    return {name: np.sum([tables[name] for tables in measured], axis=0) for name in measured[0]}


def _meteor_tables(systems: Sequence[Sequence[Corpus]]) -> list[Table]:
    """METEOR's table of each system, added up over its parts; Java is started once for all."""
    parts = [part for own in systems for part in own]
    hypotheses = [words for part in parts for words in part.hypotheses]
    references = [captions for part in parts for captions in part.references]
    counts = meteor_counts(hypotheses, references)
    tables: Table = counts.reshape(len(systems), len(systems[0]), -1, counts.shape[1]).sum(axis=1)
    return list(tables)


def _plain(interval: Interval) -> list[float]:
    return [round(number, 6) for number in (interval.value, interval.low, interval.high)]
