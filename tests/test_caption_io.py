"""Files of generated captions: round trips, layout, equal bytes, and damaged files."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.generation.caption import Caption
from pipeline.generation.caption_io import GeneratedCaptions, read_captions, write_captions
from tests.paths import ROOT

GRID = (2, 3)


def make_captions(image_id: int, *captions: tuple[str, float]) -> GeneratedCaptions:
    """Make captions from text and log-probability, with random attention."""
    rng = np.random.default_rng(image_id)
    results = []
    for text, log_probability in captions:
        words = tuple(text.split())
        results.append(
            Caption(
                words=words,
                log_probability=log_probability,
                score=log_probability / (len(words) + 1),
                word_log_probabilities=tuple(-rng.random(len(words)).round(3)),
                attention=rng.dirichlet(np.ones(6), len(words)).astype(np.float16).reshape(-1, *GRID),
            )
        )
    return GeneratedCaptions(image_id=image_id, captions=tuple(results))


GENERATED = [
    make_captions(7, ("ein Mädchen läuft", -3.25), ("ein Hund", -4.5)),
    make_captions(3, ("", -1.0)),
    *(make_captions(100 + index, ("a dog " * (1 + index % 12), -index / 7)) for index in range(150)),
]


def test_captions_survive_a_round_trip(tmp_path: Path) -> None:
    write_captions(tmp_path, iter(GENERATED), len(GENERATED), GRID, "abc")
    for result, expected in zip(read_captions(tmp_path), GENERATED, strict=True):
        assert result == expected
        np.testing.assert_array_equal(result.attention, expected.attention)
        assert [caption.attention for caption in result.captions[1:]] == [None] * len(expected.captions[1:])


def test_the_layout_of_the_files(tmp_path: Path) -> None:
    write_captions(tmp_path, GENERATED[:2], 2, GRID, "abc")
    assert (tmp_path / "captions.json").read_text(encoding="utf-8") == (
        '[\n{"image_id": 7, "caption": "ein Mädchen läuft"},\n{"image_id": 3, "caption": ""}\n]\n'
    )
    second = json.loads((tmp_path / "n_best.json").read_text(encoding="utf-8"))[0]["captions"][1]
    assert second == {
        "caption": "ein Hund",
        "log_probability": -4.5,
        "score": -1.5,
        "word_log_probabilities": list(GENERATED[0].captions[1].word_log_probabilities),
    }
    with h5py.File(tmp_path / "attention.h5") as file:
        assert file["attention"].shape == (2, 3, 6)
        assert not file["attention"][1].any()
        assert file["length"][:].tolist() == [3, 0]
        assert file["score"][0] == -3.25 / 4
        assert file.attrs["fingerprint"] == "abc"
        assert all(file[name].attrs["description"] for name in file)


def test_the_same_captions_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_captions(tmp_path / name, GENERATED, len(GENERATED), GRID, "abc")
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_captions_are_written_before_all_are_generated(tmp_path: Path) -> None:
    def interrupted() -> Iterator[GeneratedCaptions]:
        yield from GENERATED[:140]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_captions(tmp_path, interrupted(), len(GENERATED), GRID, "abc")
    with h5py.File(tmp_path / "attention.h5") as file:
        assert np.count_nonzero(file["image_id"][:]) >= 64


def test_no_images_give_empty_files(tmp_path: Path) -> None:
    write_captions(tmp_path, [], 0, GRID, "abc")
    assert json.loads((tmp_path / "captions.json").read_text()) == []
    assert read_captions(tmp_path) == []


def test_words_and_attention_are_those_of_the_best_caption() -> None:
    image = GENERATED[0]
    assert image.best is image.captions[0]
    assert image.words == ("ein", "Mädchen", "läuft")
    assert image.attention.shape == (3, *GRID)
    with pytest.raises(AssertionError, match="attention"):
        _ = replace(image, captions=(replace(image.best, attention=None),)).attention


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ("[]", ["n_best.json", "attention.h5", "different images"]),
        ("[{}]", ["n_best.json", "[0].image_id"]),
        ('[{"image_id": 7, "captions": [{"caption": 3}]}]', ["n_best.json", "[0].captions[0].caption"]),
        ("[", ["n_best.json", "Invalid JSON"]),
        (None, ["n_best.json", "no such file"]),
    ],
)
def test_errors_about_unusable_files_name_file_and_remedy(
    tmp_path: Path, content: str | None, facts: list[str]
) -> None:
    write_captions(tmp_path, GENERATED, len(GENERATED), GRID, "abc")
    path = tmp_path / "n_best.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        read_captions(tmp_path)
    for fact in [str(tmp_path), *facts, "dvc repro -f -s generate"]:
        assert fact in str(error.value)


FULL_DISK = """
import resource, sys
from pathlib import Path
from pipeline.artifacts import fresh_folder
from pipeline.errors import run
from pipeline.generation.caption_io import write_captions
from tests.test_caption_io import GENERATED, GRID
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()), resource.RLIM_INFINITY))
def main(out: Path) -> None:
    with fresh_folder(out) as folder:
        write_captions(folder, GENERATED, len(GENERATED), GRID, "abc")
run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1000, 8192, 20_000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, size: int) -> None:
    command = [sys.executable, "-c", FULL_DISK, tmp_path / "out", str(size)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"error: {tmp_path}")
    assert "bytes are free" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
