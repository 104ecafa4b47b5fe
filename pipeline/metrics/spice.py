"""SPICE: objects, attributes and relations that a caption shares with its references (Anderson et al. 2016).

The authors' Java program is included in pycocoevalcap. Its parser, Stanford CoreNLP 3.6.0, is not. gridcap downloads
nothing: the user copies `CORENLP_FILES` into the folder of the program.

Legend: `N` images.
"""

import json
import tempfile
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import numpy.typing as npt
from typing_extensions import TypedDict

from pipeline.artifacts import read_json
from pipeline.captions.tokenization import installed_version
from pipeline.errors import UserError
from pipeline.metrics.corpus import Words, check_corpus
from pipeline.metrics.java import UnavailableError, java_version, run_java

PROTOCOL: dict[str, str] = {
    "metric": "SPICE, F1 of tuples",
    "library": f"SPICE 1.0 (Java) in pycocoevalcap {installed_version('pycocoevalcap')}, Stanford CoreNLP 3.6.0",
    "average": "mean over images",
    "multiple references": "union of their tuples",
    "smoothing": "none",
    "reference": "Anderson et al. 2016",
}
"""Protocol lines of SPICE, by key."""
SIGNATURE: dict[str, str] = {"parser": "corenlp-3.6.0", "lib": "spice-1.0"}
"""Fields of SPICE's signature."""

CORENLP_FILES = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
CORENLP_ARCHIVE = "stanford-corenlp-full-2015-12-09.zip"
MAX_JAVA_VERSION = 14

STARTUP_SECONDS = 600.0
"""Timeout without captions."""
SECONDS_PER_CAPTION = 1.0
"""Additional timeout for each hypothesis and reference."""


class _FScore(TypedDict):
    f: float


class _Categories(TypedDict):
    All: _FScore


class _Row(TypedDict):
    """Scores of one image, as the program writes them."""

    image_id: int
    scores: _Categories


def spice(
    hypotheses: Sequence[Words],
    references: Sequence[Sequence[Words]],
    folder: Path | None = None,
    timeout: float | None = None,
) -> npt.NDArray[np.float64]:
    """Compute SPICE of each image, [N] in 0 to 1; the score of a corpus is their mean.

    Java needs 8 GB of memory and about 0.1 s per caption, references included.

    Args:
        hypotheses: One tokenized caption for each of N images.
        references: The tokenized references of each image.
        folder: Folder of the program, with CoreNLP in `lib`; None for the folder in pycocoevalcap.
        timeout: Seconds until Java is stopped; None for a limit that grows with the number of captions.

    Raises:
        UnavailableError: Java or a file is missing, Java is too new, or the program fails.
        ValueError: There are no images, or one has no reference.
    """
    check_corpus(hypotheses, references)
    with as_file(files("pycocoevalcap") / "spice") as default_folder:
        return _run_spice(folder or default_folder, hypotheses, references, timeout)


def _run_spice(
    folder: Path, hypotheses: Sequence[Words], references: Sequence[Sequence[Words]], timeout: float | None
) -> npt.NDArray[np.float64]:
    missing = [name for name in CORENLP_FILES if not (folder / "lib" / name).is_file()]
    if missing:
        raise UnavailableError(
            f"{folder / 'lib'}: {' and '.join(missing)} missing. Copy from {CORENLP_ARCHIVE} of the Stanford NLP Group."
        )
    if (version := java_version()) > MAX_JAVA_VERSION:
        # The program writes its results with Java's JavaScript engine, which later versions lack.
        raise UnavailableError(f"SPICE needs Java 8 to {MAX_JAVA_VERSION}, not {version}. Put one on the PATH.")
    documents = [
        {"image_id": index, "test": " ".join(hypothesis), "refs": [" ".join(words) for words in captions]}
        for index, (hypothesis, captions) in enumerate(zip(hypotheses, references, strict=True))
    ]
    timeout = timeout or STARTUP_SECONDS + SECONDS_PER_CAPTION * sum(len(captions) + 1 for captions in references)
    with tempfile.TemporaryDirectory() as work:
        input_path, output_path = Path(work) / "captions.json", Path(work) / "scores.json"
        input_path.write_text(json.dumps(documents), encoding="utf-8")
        # No -cache flag: the cache of parsed references would be written among the installed packages.
        jar = str(folder / "spice-1.0.jar")
        run_java("SPICE", ["-Xmx8G", "-jar", jar, str(input_path), "-out", str(output_path), "-silent"], "", timeout)
        try:
            rows = read_json(output_path, list[_Row], remedy="Reinstall pycocoevalcap.")
        except UserError as error:
            raise UnavailableError(f"SPICE wrote no readable scores: {error}") from None
    scores = {row["image_id"]: row["scores"]["All"]["f"] for row in rows}
    num_missing = len(set(range(len(documents))) - scores.keys())
    if num_missing:
        raise UnavailableError(
            f"SPICE wrote no scores of {num_missing} of {len(documents)} images. Reinstall pycocoevalcap."
        )
    return np.array([scores[index] for index in range(len(documents))], dtype=np.float64)
