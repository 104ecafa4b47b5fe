"""Seconds that scoring 5,000 images against 25,000 references takes, beside pycocoevalcap's scorers.

The captions are those of COCO val2017, where they lie in `../shared/real`: of each photograph five references, and the
caption of another as hypothesis, whose latter half is that of an own reference; some photographs come twice, up to
5,000. Elsewhere words are drawn by Zipf's law. Both score the same words, given as either wants them: lists of words,
and text. The scores must agree to 1e-6. Rounds take both in turn; seconds and ratios are medians of the rounds.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer
from pipeline.metrics.bleu import bleu, bleu_counts
from pipeline.metrics.cider import cider
from pipeline.metrics.corpus import Words
from pipeline.metrics.rouge import rouge_l

REAL = Path(__file__).parents[2] / "shared" / "real" / "text" / "captions_val2017_part.json"
IMAGES, REFERENCES, ROUNDS = 5000, 5, 5
TARGET = 0.5
"""The largest share of pycocoevalcap's time that ours is to take."""


def corpus() -> tuple[list[Words], list[list[Words]], str]:
    """Hypotheses, references, and what they are."""
    real = REAL.is_file()
    own, told = (real_captions(), "captions of COCO") if real else (drawn_captions(), "words drawn by Zipf's law")
    references = [own[place % len(own)] for place in range(IMAGES)]
    hypotheses: list[Words] = [
        [*other[0][: len(other[0]) // 2], *captions[0][len(captions[0]) // 2 :]]
        for captions, other in zip(references, [*references[1:], references[0]], strict=True)
    ]
    return hypotheses, references, told


def real_captions() -> list[list[Words]]:
    split = make_tokenizer(TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_length=1))
    captions: dict[int, list[Words]] = {}
    for annotation in json.loads(REAL.read_text(encoding="utf-8"))["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(split(annotation["caption"]))
    return [found[:REFERENCES] for found in captions.values() if len(found) >= REFERENCES]


def drawn_captions() -> list[list[Words]]:
    rng = np.random.default_rng(0)

    def caption() -> Words:
        return [f"w{word}" for word in np.minimum(rng.zipf(1.3, size=rng.integers(8, 14)), 20000)]

    return [[caption() for _ in range(REFERENCES)] for _ in range(IMAGES)]


def main() -> None:
    """Print seconds of both for each score and for all, and what share of pycocoevalcap's ours are."""
    hypotheses, references, told = corpus()
    gts = {row: [" ".join(words) for words in captions] for row, captions in enumerate(references)}
    res = {row: [" ".join(words)] for row, words in enumerate(hypotheses)}
    both: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "BLEU-1 to 4": (
            lambda: float(bleu(bleu_counts(hypotheses, references).sum(axis=0))[-1]),
            lambda: float(Bleu(4).compute_score(gts, res, verbose=0)[0][-1]),
        ),
        "CIDEr-D": (
            lambda: float(cider(hypotheses, references).cider_d.mean()),
            lambda: float(Cider().compute_score(gts, res)[0]),
        ),
        "ROUGE-L": (
            lambda: float(rouge_l(hypotheses, references).mean()),
            lambda: float(Rouge().compute_score(gts, res)[0]),
        ),
    }
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in [*both, "all"]}
    for _ in range(ROUNDS):
        for name, scorers in both.items():
            ours, theirs = (timed(scorer, seconds[name][side]) for side, scorer in enumerate(scorers))
            assert abs(ours - theirs) < 1e-6, f"{name}: {ours} and {theirs}"
        for side in range(2):
            seconds["all"][side].append(sum(seconds[name][side][-1] for name in both))

    count = sum(map(len, references))
    print(f"scoring {len(hypotheses)} images against {count} references, {told}; median of {ROUNDS} rounds")
    print(f"{'':>12} {'gridcap, s':>11} {'pycocoevalcap, s':>17} {'share':>6}")
    for name, (ours_all, theirs_all) in seconds.items():
        share = median(own / its for own, its in zip(ours_all, theirs_all, strict=True))
        print(f"{name:>12} {median(ours_all):>11.2f} {median(theirs_all):>17.2f} {share:>6.2f}")
    print(f"{'reached' if share <= TARGET else 'MISSED'}: all in at most {TARGET:.2f} of pycocoevalcap's time")


def timed(scorer: Callable[[], float], seconds: list[float]) -> float:
    began = time.perf_counter()
    score = scorer()
    seconds.append(time.perf_counter() - began)
    return score
