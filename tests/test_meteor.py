from pathlib import Path

import numpy as np
import pytest

from pipeline.metrics.java import UnavailableError
from pipeline.metrics.meteor import meteor, meteor_counts
from tests.java_programs import install_as_java, needs_java


def split(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


@needs_java
def test_scores_equal_those_of_the_java_program() -> None:
    counts = meteor_counts(
        split("a dog runs", "a red cube", "", "x", "a dog runs"),
        [
            split("a dog is running", "dogs"),
            split("a large red cube and a blue cone"),
            split("a dog"),
            split("y ||| z"),
            split("dogs", "a dog runs"),
        ],
    )
    # Computed with the wrapper in pycocoevalcap 1.2 on the same captions.
    assert meteor(counts) == pytest.approx([0.3123946935, 0.1912627995, 0, 0, 1])
    assert meteor(counts[:4].sum(axis=0)) == pytest.approx(0.1683625111)
    assert meteor(np.stack([counts[:4].sum(axis=0), counts[4]])) == pytest.approx([0.1683625111, 1])


def test_meteor_without_java_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="java"):
        meteor_counts([["a"]], [[["a"]]])


@pytest.mark.parametrize("output", ["", "1 2 3", "error"])
def test_unexpected_output_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str) -> None:
    install_as_java(monkeypatch, tmp_path, f"cat > {tmp_path}/input; echo '{output}'")
    with pytest.raises(UnavailableError, match="METEOR returned 1 lines for 2 captions"):
        meteor_counts([["a"]] * 2, [[["a"]]] * 2)
