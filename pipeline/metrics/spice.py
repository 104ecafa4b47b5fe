"""SPICE: objects, attributes and relations that a caption shares with its references.

Its authors' Java program lies in pycocoevalcap. The parser that it needs does not: pycocoevalcap downloads it at the
first use, into its own folder; here it must lie there already.
"""

import json
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.metrics.corpus import Words, check_corpus
from pipeline.metrics.java import UnavailableError, java_version, run_java

PROTOCOL: dict[str, str] = {
    "metric": "SPICE, F1 of tuples",
    "library": f"SPICE 1.0 (Java) in pycocoevalcap {version('pycocoevalcap')}, Stanford CoreNLP 3.6.0",
    "average": "mean over images",
    "several references": "all their tuples together",
    "smoothing": "none",
    "reference": "Anderson et al. 2016",
}
MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
ARCHIVE = "stanford-corenlp-full-2015-12-09.zip"
LAST_JAVA = 14

START_SECONDS = 600.0
SECONDS_A_CAPTION = 1.0
"""Many times what parsing one takes, so that only a program that hangs is stopped."""


def spice(
    hypotheses: Sequence[Words],
    references: Sequence[Sequence[Words]],
    folder: Path | None = None,
    timeout: float | None = None,
) -> npt.NDArray[np.float64]:
    """SPICE of each of N images, [N], in 0 to 1 (Anderson et al. 2016); a corpus scores their mean.

    `folder` holds the program and its `lib`; without it, that of pycocoevalcap. Java takes 8 GB of memory and about a
    tenth of a second a caption, references included; it is stopped when this returns or raises, and after `timeout`
    seconds (by default a time that grows with the captions) in any case.

    Raises `UnavailableError` where Java or a file is missing, Java is too new, or the program fails, and `ValueError`
    as `check_corpus` does.
    """
    check_corpus(hypotheses, references)
    with as_file(files("pycocoevalcap") / "spice") as packaged:
        return _ask(folder or packaged, hypotheses, references, timeout)


def _ask(
    folder: Path, hypotheses: Sequence[Words], references: Sequence[Sequence[Words]], timeout: float | None
) -> npt.NDArray[np.float64]:
    missing = [name for name in MODELS if not (folder / "lib" / name).is_file()]
    if missing:
        raise UnavailableError(
            f"SPICE lacks {' and '.join(missing)} in {folder / 'lib'}; take them from {ARCHIVE} of the Stanford NLP "
            "group (gridcap downloads nothing by itself)"
        )
    if (found := java_version()) > LAST_JAVA:
        # Its program writes its results by Java's engine for JavaScript, which later versions lack.
        raise UnavailableError(f"SPICE needs Java 8 to {LAST_JAVA}, not {found}; put an older one on the PATH")
    asked = [
        {"image_id": row, "test": " ".join(hypothesis), "refs": [" ".join(words) for words in captions]}
        for row, (hypothesis, captions) in enumerate(zip(hypotheses, references, strict=True))
    ]
    limit = timeout or START_SECONDS + SECONDS_A_CAPTION * sum(len(captions) + 1 for captions in references)
    with tempfile.TemporaryDirectory() as work:
        question, answer = Path(work) / "captions.json", Path(work) / "scores.json"
        question.write_text(json.dumps(asked), encoding="utf-8")
        # Without its cache of parsed references, which would lie among the installed packages.
        program = ["-Xmx8G", "-jar", str(folder / "spice-1.0.jar"), str(question), "-out", str(answer), "-silent"]
        run_java("SPICE", program, "", limit)
        try:
            scores = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(answer.read_bytes())}
            return np.array([scores[row] for row in range(len(asked))], dtype=np.float64)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnavailableError(f"SPICE ended without scores that can be read: {error!r}") from None
