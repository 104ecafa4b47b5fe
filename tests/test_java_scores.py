"""What Java programs compute: METEOR, SPICE and coco-caption's words; and what is said where they cannot."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from pipeline.metrics.java import UnavailableError, java_version
from pipeline.metrics.meteor import meteor, meteor_counts
from pipeline.metrics.ptb import ptb_words
from pipeline.metrics.spice import MODELS, spice

ROOT = Path(__file__).parents[1]
REAL_CAPTIONS = ROOT.parent / "shared/real/text/captions_val2017_part.json"

with_java = pytest.mark.skipif(shutil.which("java") is None, reason="there is no java on the PATH")


def install_as_java(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    program = folder / "java"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def split(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


@with_java
def test_meteor_is_that_of_its_java_program() -> None:
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
    # By the wrapper in pycocoevalcap 1.2, on the same captions.
    assert meteor(counts) == pytest.approx([0.3123946935, 0.1912627995, 0, 0, 1])
    assert meteor(counts[:4].sum(axis=0)) == pytest.approx(0.1683625111)
    assert meteor(np.stack([counts[:4].sum(axis=0), counts[4]])) == pytest.approx([0.1683625111, 1])


@with_java
def test_words_are_those_of_coco_caption() -> None:
    captions = [
        "A man's dog -- a BIG one -- can't run (far).",
        "",
        "``Stop!'' says the sign; it reads: 3/4 mile...",
        "two\nlines",
        ".",
        "a café <unk> 1 1/2",
    ]
    assert ptb_words(captions) == [
        # Brackets stay, since coco-caption drops `-LRB-` after all has become lower case.
        ["a", "man", "'s", "dog", "a", "big", "one", "ca", "n't", "run", "-lrb-", "far", "-rrb-"],
        [],
        ["stop", "says", "the", "sign", "it", "reads", "3/4", "mile"],
        ["two", "lines"],
        [],
        ["a", "café", "<unk>", "1", "1/2"],
    ]
    assert ptb_words([]) == []


@with_java
def test_a_caption_with_another_end_of_line_stays_one_caption() -> None:
    ends = ["\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"]
    assert ptb_words([f"a{end}b" for end in ends]) == [["a", "b"]] * len(ends)


@with_java
def test_words_of_real_captions_are_those_of_pycocoevalcap() -> None:
    captions = [caption for captions in real_captions(400) for caption in captions]
    wanted = PTBTokenizer().tokenize({place: [{"caption": caption}] for place, caption in enumerate(captions)})
    assert ptb_words(captions) == [wanted[place][0].split() for place in range(len(captions))]


def test_the_lack_of_java_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for compute in (lambda: meteor_counts([["a"]], [[["a"]]]), lambda: ptb_words(["a"]), java_version):
        with pytest.raises(UnavailableError, match="no java on the PATH; install"):
            compute()


def test_why_java_failed_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_as_java(monkeypatch, tmp_path, "echo 'Could not reserve enough space' >&2; exit 1")
    with pytest.raises(UnavailableError, match="METEOR failed: Could not reserve enough space"):
        meteor_counts([["a"]] * 5000, [[["a"]]] * 5000)
    with pytest.raises(UnavailableError, match="PTB tokenizer failed: Could not reserve enough space"):
        ptb_words(["a"] * 50000)


@pytest.mark.parametrize("said", ["", "1 2 3", "what?"])
def test_an_answer_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str) -> None:
    install_as_java(monkeypatch, tmp_path, f"cat > {tmp_path}/asked; echo '{said}'")
    with pytest.raises(UnavailableError, match="METEOR answered 1 lines for 2 captions"):
        meteor_counts([["a"]] * 2, [[["a"]]] * 2)
    with pytest.raises(UnavailableError, match="1 lines for 2 captions"):
        ptb_words(["a", "b"])


def test_java_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_as_java(monkeypatch, tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    with pytest.raises(UnavailableError, match=r"METEOR did not end within 0\.5 s"):
        meteor_counts([["a"]], [[["a"]]], timeout=0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [('openjdk version "17.0.15" 2025-04-15', 17), ('java version "1.8.0_392"', 8), ('openjdk version "9-ea"', 9)],
)
def test_versions_of_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, wanted: int) -> None:
    install_as_java(monkeypatch, tmp_path, f"echo '{said}' >&2")
    assert java_version() == wanted


def spice_folder(folder: Path) -> Path:
    (folder / "lib").mkdir()
    for name in MODELS:
        (folder / "lib" / name).touch()
    return folder


# Stands for a Java that SPICE runs on: tells its version, and answers as the program does.
SPICE_JAVA = """
if [ "$1" = -version ]; then echo 'openjdk version "1.8.0_392"' >&2; exit 0; fi
while [ "$1" != -jar ]; do shift; done
cp "$3" {folder}/asked.json; echo "$3" > {folder}/place; printf '%s' '{answer}' > "$5"
"""


def test_spice_asks_and_reads_as_its_program_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"image_id": row, "scores": {"All": {"f": f, "pr": 1.0, "re": 0.5}}} for row, f in [(1, 0.25), (0, 0.5)]]
    install_as_java(monkeypatch, tmp_path, SPICE_JAVA.format(folder=tmp_path, answer=json.dumps(rows)))
    found = spice(split("a dog", "red cube"), [split("dogs"), split("a", "b c")], folder=spice_folder(tmp_path))
    assert found.tolist() == [0.5, 0.25]
    assert json.loads((tmp_path / "asked.json").read_text()) == [
        {"image_id": 0, "test": "a dog", "refs": ["dogs"]},
        {"image_id": 1, "test": "red cube", "refs": ["a", "b c"]},
    ]
    assert not Path((tmp_path / "place").read_text().strip()).parent.exists()


@pytest.mark.parametrize("answer", ["", "[]", '[{"image_id": 0}]', '{"a": 1}'])
def test_an_answer_without_scores_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str) -> None:
    install_as_java(monkeypatch, tmp_path, SPICE_JAVA.format(folder=tmp_path, answer=answer))
    with pytest.raises(UnavailableError, match="SPICE ended without scores that can be read"):
        spice([["a"]], [[["a"]]], folder=spice_folder(tmp_path))


def test_spice_names_the_files_that_it_lacks(tmp_path: Path) -> None:
    spice_folder(tmp_path)
    (tmp_path / "lib" / MODELS[1]).unlink()
    with pytest.raises(UnavailableError, match=rf"lacks {MODELS[1]} in {tmp_path}/lib; take .* from .*\.zip"):
        spice([["a"]], [[["a"]]], folder=tmp_path)


def test_spice_says_that_java_is_too_new(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_as_java(monkeypatch, tmp_path, "echo 'openjdk version \"17.0.15\"' >&2")
    with pytest.raises(UnavailableError, match="SPICE needs Java 8 to 14, not 17"):
        spice([["a"]], [[["a"]]], folder=spice_folder(tmp_path))


def real_captions(images: int) -> list[list[str]]:
    """All captions of some photographs of COCO."""
    if not REAL_CAPTIONS.is_file():
        pytest.skip(f"no real captions at {REAL_CAPTIONS}")
    captions: dict[int, list[str]] = {}
    for annotation in json.loads(REAL_CAPTIONS.read_text())["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return list(captions.values())[:images]
