import json
from pathlib import Path

import pytest

from pipeline.metrics.java import UnavailableError
from pipeline.metrics.spice import CORENLP_FILES, spice
from tests.java_programs import install_as_java

# A Java of a version that SPICE runs on, which answers as the program does.
SPICE_JAVA = """
if [ "$1" = -version ]; then echo 'openjdk version "1.8.0_392"' >&2; exit 0; fi
while [ "$1" != -jar ]; do shift; done
cp "$3" {folder}/input.json; echo "$3" > {folder}/input_path; printf '%s' '{output}' > "$5"
"""


def spice_folder(folder: Path) -> Path:
    (folder / "lib").mkdir()
    for name in CORENLP_FILES:
        (folder / "lib" / name).touch()
    return folder


def test_captions_are_sent_and_scores_are_read_by_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"image_id": row, "scores": {"All": {"f": f, "pr": 1.0, "re": 0.5}}} for row, f in [(1, 0.25), (0, 0.5)]]
    install_as_java(monkeypatch, tmp_path, SPICE_JAVA.format(folder=tmp_path, output=json.dumps(rows)))
    references = [[["dogs"]], [["a"], ["b", "c"]]]
    scores = spice([["a", "dog"], ["red", "cube"]], references, folder=spice_folder(tmp_path))
    assert scores.tolist() == [0.5, 0.25]
    assert json.loads((tmp_path / "input.json").read_text()) == [
        {"image_id": 0, "test": "a dog", "refs": ["dogs"]},
        {"image_id": 1, "test": "red cube", "refs": ["a", "b c"]},
    ]
    # The work folder is removed.
    assert not Path((tmp_path / "input_path").read_text().strip()).parent.exists()


@pytest.mark.parametrize("output", ["", "[]", '[{"image_id": 0}]', '{"a": 1}'])
def test_unexpected_output_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str) -> None:
    install_as_java(monkeypatch, tmp_path, SPICE_JAVA.format(folder=tmp_path, output=output))
    with pytest.raises(UnavailableError, match=r"SPICE wrote no .*scores"):
        spice([["a"]], [[["a"]]], folder=spice_folder(tmp_path))


def test_missing_files_are_named_with_their_source(tmp_path: Path) -> None:
    spice_folder(tmp_path)
    (tmp_path / "lib" / CORENLP_FILES[1]).unlink()
    with pytest.raises(UnavailableError, match=rf"{tmp_path}/lib: {CORENLP_FILES[1]} missing.*\.zip"):
        spice([["a"]], [[["a"]]], folder=tmp_path)


def test_a_newer_java_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_as_java(monkeypatch, tmp_path, "echo 'openjdk version \"17.0.15\"' >&2")
    with pytest.raises(UnavailableError, match="Java 8 to 14, not 17"):
        spice([["a"]], [[["a"]]], folder=spice_folder(tmp_path))
