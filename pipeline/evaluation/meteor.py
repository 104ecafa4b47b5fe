"""METEOR, computed by its authors' Java program, which pycocoevalcap carries."""

import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path

from pipeline.evaluation.corpus import Words, check_corpus

PROTOCOL: dict[str, str] = {
    "metric": "METEOR",
    "library": f"METEOR 1.5 (Java) in pycocoevalcap {version('pycocoevalcap')}",
    "average": "corpus",
    "language": "en",
    "options": "-l en -norm",
    "smoothing": "none",
    "reference": "Denkowski and Lavie 2014",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MeteorScore:
    """METEOR of a corpus and of each of its images, in 0 to 1."""

    corpus: float
    """From counts added up over the corpus: not the mean over images."""
    images: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unavailable:
    """A score that could not be computed on this machine."""

    reason: str


def meteor(
    hypotheses: Sequence[Words], references: Sequence[Sequence[Words]], timeout: float = 600.0
) -> MeteorScore | Unavailable:
    """Score a corpus by METEOR 1.5 (Denkowski and Lavie 2014), or say why this machine cannot.

    Java is stopped when this returns or raises, and after `timeout` seconds in any case. It needs 2 GB of
    memory, about 5 s to start and then milliseconds an image.

    Raises `ValueError` as `check_corpus` does.
    """
    check_corpus(hypotheses, references)
    java = shutil.which("java")
    if java is None:
        return Unavailable(reason="no java on the PATH; install a Java runtime, version 8 or later")
    requests = [
        " ||| ".join(["SCORE", *map(_line, captions), _line(hypothesis)])
        for hypothesis, captions in zip(hypotheses, references, strict=True)
    ]
    with as_file(files("pycocoevalcap") / "meteor") as folder:
        return _ask(_command(java, folder), requests, timeout)


def _line(words: Words) -> str:
    """One line of text, without the mark that separates sentences in a request."""
    return " ".join(" ".join(words).replace("|||", " ").split())


def _command(java: str, folder: Path) -> list[str]:
    # Otherwise the machine's locale decides how text is read and whether numbers have a decimal comma.
    machine = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-Duser.language=en"]
    return [*machine, "-jar", str(folder / "meteor-1.5.jar"), "-", "-", "-stdio", "-l", "en", "-norm"]


def _ask(command: list[str], requests: list[str], timeout: float) -> MeteorScore | Unavailable:
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        try:
            with subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                encoding="utf-8",
                errors="replace",
            ) as process:
                watchdog = threading.Timer(timeout, process.kill)
                watchdog.start()
                try:
                    return _converse(process, requests)
                finally:
                    watchdog.cancel()
                    process.kill()
        except (OSError, ValueError):
            complaints.seek(0)
            said = complaints.read().strip().splitlines()
            last = said[-1] if said else f"no answer, or none within {timeout:g} s"
            return Unavailable(reason=f"METEOR's Java program failed: {last}")


def _converse(process: subprocess.Popen[str], requests: list[str]) -> MeteorScore:
    asking, answers = process.stdin, process.stdout
    assert asking is not None
    assert answers is not None

    def ask(request: str) -> str:
        asking.write(request + "\n")
        asking.flush()
        return answers.readline().strip()

    counts = [ask(request) for request in requests]
    first = float(ask(" ||| ".join(["EVAL", *counts])))
    images = (first, *(float(answers.readline()) for _ in requests[1:]))
    return MeteorScore(corpus=float(answers.readline()), images=images)
