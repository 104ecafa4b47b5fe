"""METEOR: words of a caption aligned with a reference by form, stem, synonym and paraphrase (Denkowski and Lavie 2014).

The authors' Java program, included in pycocoevalcap, aligns captions and counts matches. `meteor` computes scores from
sums of these counts, so bootstrap samples and subsets of the images do not run Java again.

Legend: `N` images.
"""

from collections.abc import Sequence
from importlib.resources import as_file, files

import numpy as np
import numpy.typing as npt

from pipeline.captions.tokenization import installed_version
from pipeline.metrics.corpus import LIBRARY, LIBRARY_TAG, Words, check_corpus
from pipeline.metrics.java import UnavailableError, run_java

PROTOCOL: dict[str, str] = {
    "metric": "METEOR",
    "library": f"METEOR 1.5 (Java) in pycocoevalcap {installed_version('pycocoevalcap')}; counts summed by {LIBRARY}",
    "average": "corpus",
    "multiple references": "the best one",
    "language": "en",
    "options": "-l en -norm",
    "smoothing": "none",
    "reference": "Denkowski and Lavie 2014",
}
"""Protocol lines of METEOR, by key."""
SIGNATURE: dict[str, str] = {"norm": "yes", "lib": f"meteor-1.5+{LIBRARY_TAG}"}
"""Fields of METEOR's signature."""

# Parameters of the program for English ("rank" task), in the symbols of the paper: alpha weighs precision against
# recall, beta and gamma set the fragmentation penalty, delta weighs content words against function words.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
"""Weights of exact, stem, synonym and paraphrase matches, [4]."""
NUM_STATISTICS = 23
"""Statistics that the program prints for each image."""

STARTUP_SECONDS = 120.0
"""Timeout without captions."""
SECONDS_PER_CAPTION = 0.1
"""Additional timeout for each reference."""


def meteor_counts(
    hypotheses: Sequence[Words], references: Sequence[Sequence[Words]], timeout: float | None = None
) -> npt.NDArray[np.float64]:
    """Count matches for METEOR, against the best reference of each image.

    Java needs 2 GB of memory, a few seconds to start and then milliseconds per image.

    Args:
        hypotheses: One tokenized caption for each of N images.
        references: The tokenized references of each image.
        timeout: Seconds until Java is stopped; None for a limit that grows with the number of references.

    Returns:
        Counts [N, 6]: weighted matches and weighted length of the hypothesis, the same of the reference, chunks
        (0 if all words of both match in one chunk), and matched words.

    Raises:
        UnavailableError: Java is missing or its program fails.
        ValueError: There are no images, or one has no reference.
    """
    check_corpus(hypotheses, references)
    requests = [
        " ||| ".join(["SCORE", *map(_join_words, captions), _join_words(hypothesis)]) + "\n"
        for hypothesis, captions in zip(hypotheses, references, strict=True)
    ]
    timeout = timeout or STARTUP_SECONDS + SECONDS_PER_CAPTION * sum(map(len, references))
    with as_file(files("pycocoevalcap") / "meteor") as folder:
        arguments = ["-Xmx2G", "-jar", str(folder / "meteor-1.5.jar"), "-", "-", "-stdio", "-l", "en", "-norm"]
        lines = run_java("METEOR", arguments, "".join(requests), timeout).splitlines()
    try:
        statistics = np.array([line.split() for line in lines], dtype=np.float64)
        return _weighted_counts(statistics.reshape(len(requests), NUM_STATISTICS))
    except ValueError:
        raise UnavailableError(
            f"METEOR returned {len(lines)} lines for {len(requests)} captions: {lines[-1:]}. Reinstall pycocoevalcap."
        ) from None


def meteor(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute METEOR, [...] in 0 to 1, from summed counts [..., 6]."""
    matches, length, reference_matches, reference_length, chunks, matched_words = np.moveaxis(counts, -1, 0)
    matched = (matches > 0) & (reference_matches > 0)
    precision = np.divide(matches, length, where=matched, out=np.ones_like(matches))
    recall = np.divide(reference_matches, reference_length, where=matched, out=np.ones_like(matches))
    f_mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
    penalty = GAMMA * np.divide(chunks, matched_words, where=matched, out=np.ones_like(chunks)) ** BETA
    return np.asarray(np.where(matched, f_mean * (1 - penalty), 0.0))


def _join_words(words: Words) -> str:
    """Join words to one line without `|||`, which separates the sentences of a request."""
    return " ".join(" ".join(words).replace("|||", " ").split())


def _weighted_counts(statistics: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Weight the statistics of the program and return the counts [N, 6] of `meteor_counts`.

    Args:
        statistics: [N, 23]. Columns 0 and 1: length of hypothesis and reference. 2 and 3: their function words. 4 to
            19: for each of four kinds of match, matched content words of hypothesis and reference, then matched
            function words of both. 20: chunks. 21 and 22: matched words of hypothesis and reference.
    """
    lengths, function_words = statistics[:, 0:2], statistics[:, 2:4]  # [N, hypothesis or reference]
    # [N, kind of match, hypothesis or reference]
    content_matches, function_matches = np.moveaxis(statistics[:, 4:20].reshape(-1, 4, 2, 2), 2, 0)
    matches = np.einsum("k,nks->ns", MATCH_WEIGHTS, DELTA * content_matches + (1 - DELTA) * function_matches)  # [N, 2]
    weighted_lengths = DELTA * (lengths - function_words) + (1 - DELTA) * function_words  # [N, 2]
    chunks, matched_words = statistics[:, 20], statistics[:, 21:23].mean(axis=1)  # [N]
    all_matched = ((content_matches + function_matches).sum(axis=1) == lengths).all(axis=1)  # [N]
    chunks = np.where(all_matched & (chunks == 1), 0.0, chunks)
    matches_and_lengths = np.stack([matches, weighted_lengths], axis=-1).reshape(-1, 4)  # [N, 4]
    return np.column_stack([matches_and_lengths, chunks, matched_words])
