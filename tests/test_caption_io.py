"""Files of generated captions: round trips, layout, equal bytes, and damaged files."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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
        ("[]", ["n_best.json", "captions.json", "different captions"]),
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


def edit_n_best(edit: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "n_best.json"
        rows = json.loads(path.read_text())
        edit(rows)
        path.write_text(json.dumps(rows))

    return damage


def edit_attention(edit: Callable[[h5py.File], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with h5py.File(folder / "attention.h5", "r+") as file:
            edit(file)

    return damage


def replace_dataset(name: str, value: object) -> Callable[[Path], None]:
    def edit(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return edit_attention(edit)


def set_weight(value: float) -> Callable[[Path], None]:
    return edit_attention(lambda file: file["attention"].__setitem__((0, 0, 0), value))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (edit_n_best(lambda rows: rows.append(rows[0])), "has an image twice"),
        (edit_n_best(lambda rows: rows[0].update(image_id=2**63)), r"\[0\]\.image_id"),
        (edit_n_best(lambda rows: rows[0].update(captions=[])), r"\[0\]\.captions"),
        (edit_n_best(lambda rows: rows[0]["captions"][0].update(caption="ein Hund läuft")), "captions.json"),
        (edit_n_best(lambda rows: rows[0]["captions"][0].update(score=math.nan)), "score: .*finite"),
        (edit_n_best(lambda rows: rows[0]["captions"][0].update(score=-9.0)), "different captions"),
        (edit_n_best(lambda rows: rows[0]["captions"][0].update(log_probability=800)), "log_probability"),
        (edit_n_best(lambda rows: rows[0]["captions"][0]["word_log_probabilities"].pop()), "different captions"),
        (edit_n_best(lambda rows: rows[0]["captions"][1]["word_log_probabilities"].pop()), "another number of words"),
        (edit_n_best(lambda rows: rows[0]["captions"][1]["word_log_probabilities"].append(900)), "less than"),
        (lambda folder: (folder / "captions.json").write_text('[{"image_id": 7, "caption": "a"}]'), "captions.json"),
        (lambda folder: (folder / "captions.json").unlink(), "no such file"),
        (edit_attention(lambda file: file["caption"].__setitem__(0, "ein Hund")), "different captions"),
        (edit_attention(lambda file: file["caption"].__setitem__(0, b"\xff")), "utf-8"),
        (edit_attention(lambda file: file["attention"].resize(2, axis=1)), "attention of row"),
        (edit_attention(lambda file: file["attention"].resize(10**9, axis=0)), "dataset attention is"),
        (replace_dataset("attention", np.zeros((len(GENERATED), 12, 7), np.float16)), "dataset attention is"),
        (replace_dataset("attention", np.zeros((len(GENERATED), 12, 6), np.float32)), "dataset attention is"),
        (replace_dataset("length", np.zeros(len(GENERATED), np.float32)), "dataset length is"),
        (edit_attention(lambda file: file.attrs.update(grid_height=-2, grid_width=-3)), "grid is -2 x -3"),
        (edit_attention(lambda file: file.attrs.update(grid_height="two")), "invalid literal"),
        (set_weight(math.nan), "not from 0 to 1"),
        (set_weight(-0.1), "not from 0 to 1"),
        (set_weight(math.inf), "not from 0 to 1"),
    ],
)
def test_values_out_of_bounds_and_inconsistent_files_are_errors(
    tmp_path: Path, damage: Callable[[Path], None], fault: str
) -> None:
    write_captions(tmp_path, GENERATED, len(GENERATED), GRID, "abc")
    damage(tmp_path)
    with pytest.raises(UserError, match=rf"{fault}.* Run `dvc repro -f -s generate`\.") as error:
        read_captions(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


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
