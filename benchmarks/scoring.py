"""Time of scoring 5,000 images against 25,000 references, compared with pycocoevalcap's scorers.

The captions are those of COCO val2017 if `../shared/real` has them: five references per photograph, and as hypothesis
half a caption of another photograph with half a reference; photographs repeat up to 5,000. Otherwise words are drawn
from Zipf's law. Both libraries score the same words, in the form that each takes, and must agree to 1e-6. Rounds
alternate between them; seconds and ratios are medians over the rounds.
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

REAL_CAPTIONS = Path(__file__).parents[2] / "shared" / "real" / "text" / "captions_val2017_part.json"
NUM_IMAGES, NUM_REFERENCES, NUM_ROUNDS = 5000, 5, 5
MAX_RATIO = 0.5
"""Target for gridcap's time, as a fraction of pycocoevalcap's."""


def build_corpus() -> tuple[list[Words], list[list[Words]], str]:
    """Build hypotheses and references, and describe their source."""
    if REAL_CAPTIONS.is_file():
        captions, source = read_real_captions(), "captions of COCO"
    else:
        captions, source = draw_captions(), "words drawn from Zipf's law"
    references = [captions[index % len(captions)] for index in range(NUM_IMAGES)]
    hypotheses: list[Words] = [
        [*other[0][: len(other[0]) // 2], *matching[0][len(matching[0]) // 2 :]]
        for matching, other in zip(references, [*references[1:], references[0]], strict=True)
    ]
    return hypotheses, references, source


def read_real_captions() -> list[list[Words]]:
    split_words = make_tokenizer(TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_length=1))
    captions: dict[int, list[Words]] = {}
    for annotation in json.loads(REAL_CAPTIONS.read_text(encoding="utf-8"))["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(split_words(annotation["caption"]))
    return [of_image[:NUM_REFERENCES] for of_image in captions.values() if len(of_image) >= NUM_REFERENCES]


def draw_captions() -> list[list[Words]]:
    rng = np.random.default_rng(0)

    def caption() -> Words:
        return [f"w{word}" for word in np.minimum(rng.zipf(1.3, size=rng.integers(8, 14)), 20000)]

    return [[caption() for _ in range(NUM_REFERENCES)] for _ in range(NUM_IMAGES)]


def main() -> None:
    """Print the seconds of both libraries and their ratio, for each metric and for all."""
    hypotheses, references, source = build_corpus()
    gts = {index: [" ".join(words) for words in captions] for index, captions in enumerate(references)}
    res = {index: [" ".join(words)] for index, words in enumerate(hypotheses)}
    scorers: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
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
    seconds: dict[str, tuple[list[float], list[float]]] = {metric: ([], []) for metric in [*scorers, "all"]}
    for _ in range(NUM_ROUNDS):
        for metric, pair in scorers.items():
            ours, theirs = (run_timed(scorer, seconds[metric][i]) for i, scorer in enumerate(pair))
            assert abs(ours - theirs) < 1e-6, f"{metric}: {ours} and {theirs}"
        for i in range(2):
            seconds["all"][i].append(sum(seconds[metric][i][-1] for metric in scorers))

    num_references = sum(map(len, references))
    print(
        f"scoring {len(hypotheses)} images against {num_references} references, {source}; median of {NUM_ROUNDS} rounds"
    )
    print(f"{'':>12} {'gridcap, s':>11} {'pycocoevalcap, s':>17} {'ratio':>6}")
    for metric, (ours_s, theirs_s) in seconds.items():
        ratio = median(a / b for a, b in zip(ours_s, theirs_s, strict=True))
        print(f"{metric:>12} {median(ours_s):>11.2f} {median(theirs_s):>17.2f} {ratio:>6.2f}")
    print(f"{'reached' if ratio <= MAX_RATIO else 'MISSED'}: all in at most {MAX_RATIO:.2f} of pycocoevalcap's time")


def run_timed(scorer: Callable[[], float], seconds: list[float]) -> float:
    start = time.perf_counter()
    score = scorer()
    seconds.append(time.perf_counter() - start)
    return score
