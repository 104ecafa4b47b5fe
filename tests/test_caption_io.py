"""Generated captions on disk: what is written is read back, in few pieces and always in the same bytes."""

import json
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.generation.caption_io import GeneratedCaptions, RankedCaption, read_captions, write_captions

REGIONS = 6


def ranked(caption: str, log_probability: float) -> RankedCaption:
    words = tuple(caption.split())
    return RankedCaption(words=words, log_probability=log_probability, score=log_probability / (len(words) + 1))


def generated(image_id: int, *captions: RankedCaption) -> GeneratedCaptions:
    rng = np.random.default_rng(image_id)
    attention = rng.dirichlet(np.ones(REGIONS), len(captions[0].words)).astype(np.float16)
    return GeneratedCaptions(image_id=image_id, captions=captions, attention=attention.reshape(-1, REGIONS))


FOUND = [
    generated(7, ranked("ein Mädchen läuft", -3.25), ranked("ein Hund", -4.5)),
    generated(3, ranked("", -1.0)),
    *(generated(100 + number, ranked("a dog " * (1 + number % 12), -number / 7)) for number in range(150)),
]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_captions(tmp_path, iter(FOUND), len(FOUND), (2, 3), "abc")
    for read, written in zip(read_captions(tmp_path), FOUND, strict=True):
        assert (read.image_id, read.captions) == (written.image_id, written.captions)
        np.testing.assert_array_equal(read.attention, written.attention)


def test_the_files_are_what_others_read(tmp_path: Path) -> None:
    write_captions(tmp_path, FOUND[:2], 2, (2, 3), "abc")
    assert json.loads((tmp_path / "captions.json").read_text(encoding="utf-8")) == [
        {"image_id": 7, "caption": "ein Mädchen läuft"},
        {"image_id": 3, "caption": ""},
    ]
    second = json.loads((tmp_path / "n_best.json").read_text(encoding="utf-8"))[0]["captions"][1]
    assert second == {"caption": "ein Hund", "log_probability": -4.5, "score": -1.5}
    with h5py.File(tmp_path / "attention.h5") as file:
        assert file["attention"].shape == (2, 3, REGIONS)
        assert not file["attention"][1].any()
        assert file["length"][:].tolist() == [3, 0]
        assert file["score"][0] == -3.25 / 4
        assert file.attrs["fingerprint"] == "abc"
        assert all(file[name].attrs["description"] for name in file)


def test_the_same_captions_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_captions(tmp_path / name, FOUND, len(FOUND), (2, 3), "abc")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_captions_are_written_while_others_are_still_searched_for(tmp_path: Path) -> None:
    asked = 0

    def search() -> Iterator[GeneratedCaptions]:
        nonlocal asked
        for one in FOUND:
            asked += 1
            yield one
            if asked == 140:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_captions(tmp_path, search(), len(FOUND), (2, 3), "abc")
    with h5py.File(tmp_path / "attention.h5") as file:
        assert np.count_nonzero(file["image_id"][:]) >= 64


def test_no_images_are_an_empty_list(tmp_path: Path) -> None:
    write_captions(tmp_path, [], 0, (2, 3), "abc")
    assert json.loads((tmp_path / "captions.json").read_text()) == []
    assert read_captions(tmp_path) == []


def test_files_of_different_runs_are_refused(tmp_path: Path) -> None:
    write_captions(tmp_path, FOUND, len(FOUND), (2, 3), "abc")
    (tmp_path / "n_best.json").write_text("[]")
    with pytest.raises(UserError, match=r"n_best.json and attention.h5 are of different runs; run `dvc repro -f"):
        read_captions(tmp_path)
    (tmp_path / "n_best.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"n_best.json: cannot be read"):
        read_captions(tmp_path)
    (tmp_path / "n_best.json").unlink()
    with pytest.raises(UserError, match=r"n_best.json: no such file; run `dvc repro generate`"):
        read_captions(tmp_path)
