"""Images named on the command line."""

import errno
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import UserError
from pipeline.prediction.inputs import find_inputs


def test_a_folder_is_searched_for_images_sorted_by_path(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.JPG", "a/d.pdf", "e.mpg", "notes.txt", ".hidden.png", ".hidden/f.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    inputs = find_inputs(["first.jpg", str(tmp_path)])
    assert [image.name for image in inputs] == ["first.jpg", f"{tmp_path}/a/c.JPG", f"{tmp_path}/b.png"]
    assert [image.source for image in inputs] == [Path(image.name) for image in inputs]


def test_images_that_pillow_cannot_read_are_listed(tmp_path: Path) -> None:
    for name in ("IMG_0001.HEIC", "b.heif", "c.avif", "d.jxl"):
        (tmp_path / name).touch()
    names = [Path(image.name).name for image in find_inputs([str(tmp_path)])]
    assert names == ["IMG_0001.HEIC", "b.heif", "c.avif", "d.jxl"]


def test_broken_links_and_unlisted_folders_are_kept_and_pipes_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.png").touch()
    (tmp_path / "broken.png").symlink_to("elsewhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    real_scandir = os.scandir

    def scandir(path: str | Path) -> object:
        if Path(path).name == "closed":  # tests may run as root, which can list any folder
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    names = [Path(image.name).name for image in find_inputs([str(tmp_path)])]
    assert names == ["a.png", "broken.png", "closed"]


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"image")))
    [image] = find_inputs(["-"])
    assert (image.name, image.source) == ("-", b"image")


@pytest.mark.parametrize(
    ("argument", "fact"),
    [("https://example.org/a.jpg", "https://example.org/a.jpg: URL"), ("", "empty"), (None, "contains no images")],
)
def test_arguments_that_name_no_image_are_errors(tmp_path: Path, argument: str | None, fact: str) -> None:
    with pytest.raises(UserError, match=fact):
        find_inputs([str(tmp_path) if argument is None else argument])
