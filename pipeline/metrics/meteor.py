"""METEOR: words of a caption matched with a reference's by form, stem, synonym and paraphrase.

Its authors' Java program, which pycocoevalcap carries, aligns the words and counts; `meteor` turns sums of its counts
into scores, so that a resample or a subset of the images needs no Java again.
"""

from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import as_file, files

import numpy as np
import numpy.typing as npt

from pipeline.metrics.corpus import LIBRARY, Words, check_corpus
from pipeline.metrics.java import UnavailableError, run_java

PROTOCOL: dict[str, str] = {
    "metric": "METEOR",
    "library": f"METEOR 1.5 (Java) in pycocoevalcap {version('pycocoevalcap')}; sums of its counts by {LIBRARY}",
    "average": "corpus",
    "several references": "the best one",
    "language": "en",
    "options": "-l en -norm",
    "smoothing": "none",
    "reference": "Denkowski and Lavie 2014",
}
# Of the English that ranks translations, the program's default: of the harmonic mean, of the penalty for gaps, of
# content words beside function words, and of matches by form, stem, synonym and paraphrase.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])

START_SECONDS = 120.0
SECONDS_A_CAPTION = 0.1
"""Many times what one takes, so that only a program that hangs is stopped."""


def meteor_counts(
    hypotheses: Sequence[Words], references: Sequence[Sequence[Words]], timeout: float | None = None
) -> npt.NDArray[np.float64]:
    """Count what METEOR needs, for each of N images, against the reference that it scores best with: [N, 6].

    Columns 0 and 1 are the weighted matches of the hypothesis and its weighted length, 2 and 3 those of the reference,
    4 the runs in which matched words stand together (0 where all of both match in one), and 5 the matched words.

    Java takes 2 GB of memory, some seconds to start and then milliseconds an image; it is stopped when this returns or
    raises, and after `timeout` seconds (by default a time that grows with the images) in any case.

    Raises `UnavailableError` where Java is missing or its program fails, and `ValueError` as `check_corpus` does.
    """
    check_corpus(hypotheses, references)
    requests = [
        " ||| ".join(["SCORE", *map(_line, captions), _line(hypothesis)]) + "\n"
        for hypothesis, captions in zip(hypotheses, references, strict=True)
    ]
    limit = timeout or START_SECONDS + SECONDS_A_CAPTION * sum(map(len, references))
    with as_file(files("pycocoevalcap") / "meteor") as folder:
        program = ["-Xmx2G", "-jar", str(folder / "meteor-1.5.jar"), "-", "-", "-stdio", "-l", "en", "-norm"]
        said = run_java("METEOR", program, "".join(requests), limit).splitlines()
    try:
        counts = np.array([line.split() for line in said], dtype=np.float64).reshape(len(requests), 23)
    except ValueError:
        raise UnavailableError(f"METEOR answered {len(said)} lines for {len(requests)} captions: {said[-1:]}") from None
    return _weighted(counts)


def meteor(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """METEOR [...], in 0 to 1, from summed counts [..., 6] (Denkowski and Lavie 2014)."""
    matches, length, reference_matches, reference_length, runs, words = np.moveaxis(counts, -1, 0)
    matched = (matches > 0) & (reference_matches > 0)
    precision = np.divide(matches, length, where=matched, out=np.ones_like(matches))
    recall = np.divide(reference_matches, reference_length, where=matched, out=np.ones_like(matches))
    mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
    penalty = GAMMA * np.divide(runs, words, where=matched, out=np.ones_like(runs)) ** BETA
    return np.asarray(np.where(matched, mean * (1 - penalty), 0.0))


def _line(words: Words) -> str:
    """One line of text, without the mark that separates sentences in a request."""
    return " ".join(" ".join(words).replace("|||", " ").split())


def _weighted(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What is summed up [N, 6] of the program's counts [N, 23].

    Those are the length of hypothesis and of reference, the function words of either; for each kind of match the
    content words matched in hypothesis and in reference and the function words in either; the runs, and the words
    matched in either.
    """
    lengths, function_words = counts[:, 0:2], counts[:, 2:4]
    content_matches, function_matches = np.moveaxis(counts[:, 4:20].reshape(-1, 4, 2, 2), 2, 0)  # [N, kind, side]
    matches = np.einsum("k,nks->ns", WEIGHTS, DELTA * content_matches + (1 - DELTA) * function_matches)
    weighted_lengths = DELTA * (lengths - function_words) + (1 - DELTA) * function_words
    runs, words = counts[:, 20], counts[:, 21:23].mean(axis=1)
    whole = (content_matches + function_matches).sum(axis=1) == lengths
    runs = np.where(whole.all(axis=1) & (runs == 1), 0.0, runs)
    sides = np.stack([matches, weighted_lengths], axis=-1).reshape(-1, 4)
    return np.column_stack([sides, runs, words])
