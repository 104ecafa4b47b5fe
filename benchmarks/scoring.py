"""Time of scoring 5,000 images against 25,000 references, compared with pycocoevalcap's scorers.

The captions are those of COCO val2017 if `../shared/real` has them: five references per image, and as hypothesis the
first half of a caption of another image with the second half of a reference. Images are repeated up to 5,000. Without
the file, words are drawn from Zipf's law. Both libraries score the same words, and must agree to 1e-6. Each round times
both. Seconds and ratios are medians over the rounds.

The last line is the time of the reward of one step of `refine`: CIDEr-D of sampled captions with the document
frequencies of the corpus.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from pipeline.captions.tokenizer import make_tokenizer
from pipeline.evaluation.coco_files import read_references
from pipeline.metrics.bleu import bleu, bleu_counts
from pipeline.metrics.cider import DocumentFrequencies, cider
from pipeline.metrics.corpus import Words
from pipeline.metrics.rouge import rouge_l
from pipeline.metrics.tokenizers import SPACY_PARAMS

REAL_CAPTIONS = Path(__file__).parents[2] / "shared" / "real" / "text" / "captions_val2017_part.json"
NUM_IMAGES, NUM_ROUNDS = 5000, 5
REFERENCES_PER_IMAGE = 5
TOLERANCE = 1e-6
"""Maximum difference between the scores of the two libraries."""
MAX_RATIO = 0.5
"""Target for the time of gridcap divided by that of pycocoevalcap, for all metrics together."""
NUM_SAMPLES, REWARD_ROUNDS = 50, 50
"""Captions that are rewarded at once, and how often."""
MAX_REWARD_MS = 3.0
"""Target for the time of their reward, ms."""


def build_corpus() -> tuple[list[Words], list[list[Words]], str]:
    """Build a corpus.

    Returns:
        The hypotheses, the references of each, and a description of their source.
    """
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
    """Read and tokenize the references of the images that have enough of them."""
    split_words = make_tokenizer(SPACY_PARAMS)
    captions: dict[int, list[Words]] = {}
    for image_id, references in read_references(REAL_CAPTIONS).captions.items():
        captions[image_id] = [split_words(caption) for caption in references[:REFERENCES_PER_IMAGE]]
    return [references for references in captions.values() if len(references) == REFERENCES_PER_IMAGE]


def draw_captions() -> list[list[Words]]:
    """Draw the references of each image from Zipf's law."""
    rng = np.random.default_rng(0)

    def caption() -> Words:
        return [f"w{word}" for word in np.minimum(rng.zipf(1.3, size=rng.integers(8, 14)), 20000)]

    return [[caption() for _ in range(REFERENCES_PER_IMAGE)] for _ in range(NUM_IMAGES)]


def main() -> None:
    """Print the seconds of both libraries and their ratio, for each metric and for all together."""
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
            score, expected = (run_timed(scorer, seconds[metric][i]) for i, scorer in enumerate(pair))
            assert abs(score - expected) < TOLERANCE, f"{metric}: {score} instead of {expected}"
        for i in range(2):
            seconds["all"][i].append(sum(seconds[metric][i][-1] for metric in scorers))

    num_references = sum(map(len, references))
    print(
        f"scoring {len(hypotheses)} images against {num_references} references, {source}; median of {NUM_ROUNDS} rounds"
    )
    print(f"{'':>12} {'gridcap, s':>11} {'pycocoevalcap, s':>17} {'ratio':>6}")
    ratios = {metric: median(a / b for a, b in zip(*both, strict=True)) for metric, both in seconds.items()}
    for metric, ratio in ratios.items():
        gridcap_seconds, pycocoevalcap_seconds = (median(rounds) for rounds in seconds[metric])
        print(f"{metric:>12} {gridcap_seconds:>11.2f} {pycocoevalcap_seconds:>17.2f} {ratio:>6.2f}")
    verdict = "reached" if ratios["all"] <= MAX_RATIO else "MISSED"
    print(f"{verdict}: all in at most {MAX_RATIO:.2f} of pycocoevalcap's time")
    milliseconds = 1000 * time_reward(hypotheses, references)
    verdict = "reached" if milliseconds <= MAX_REWARD_MS else "MISSED"
    print(
        f"{verdict}: reward of {NUM_SAMPLES} samples against {REFERENCES_PER_IMAGE} references each in"
        f" {milliseconds:.1f} ms, at most {MAX_REWARD_MS:.0f} ms; lowest of {REWARD_ROUNDS} rounds"
    )


def time_reward(hypotheses: list[Words], references: list[list[Words]]) -> float:
    """Return the lowest seconds of the reward of some captions."""
    frequencies, seconds = DocumentFrequencies(references), []
    for _ in range(REWARD_ROUNDS):
        start = time.perf_counter()
        cider(hypotheses[:NUM_SAMPLES], references[:NUM_SAMPLES], frequencies)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def run_timed(scorer: Callable[[], float], seconds: list[float]) -> float:
    """Run a scorer, append its seconds to a list, and return its score."""
    start = time.perf_counter()
    score = scorer()
    seconds.append(time.perf_counter() - start)
    return score
