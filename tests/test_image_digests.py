import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.captions.sources.image_digests import image_md5s, write_image_digest

FILES = ("a.jpg", "b/ä \n$.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two image files, of which the second is a link."""
    root = tmp_path / "images"
    (root / "b").mkdir(parents=True)
    (root / FILES[0]).write_bytes(b"first")
    (tmp_path / "elsewhere.png").write_bytes(b"second")
    (root / FILES[1]).symlink_to(tmp_path / "elsewhere.png")
    return root


def digest(folder: Path) -> dict[str, object]:
    write_image_digest(folder.parent / "digest.json", image_md5s(folder, FILES))
    content: dict[str, object] = json.loads((folder.parent / "digest.json").read_text())
    return content


def test_the_md5_of_each_file_is_that_of_its_bytes(folder: Path) -> None:
    contents = dict(zip(FILES, (b"first", b"second"), strict=True))
    assert image_md5s(folder, FILES) == {file: hashlib.md5(content).hexdigest() for file, content in contents.items()}
    assert image_md5s(folder, ()) == {}


def test_the_digest_changes_with_the_bytes_of_any_image(folder: Path) -> None:
    before = digest(folder)
    assert before["num_images"] == 2
    assert digest(folder) == before
    (folder.parent / "elsewhere.png").write_bytes(b"third!")
    assert digest(folder)["sha256"] != before["sha256"]


@pytest.mark.slow
def test_files_that_dvc_hashed_are_read_again_only_if_they_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = folder.parent
    monkeypatch.chdir(repository)
    (repository / "dvc.yaml").write_text("stages: {x: {cmd: touch x, deps: [images], outs: [x]}}")
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], check=True)

    before = image_md5s(folder, FILES)
    # Other bytes of the same size and time are not noticed: the files are not read.
    for path, content in ((folder / FILES[0], b"FIRST"), (folder.parent / "elsewhere.png", b"SECOND")):
        stat = path.stat()
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert image_md5s(folder, FILES) == before

    (folder.parent / "elsewhere.png").write_bytes(b"third!")
    after = image_md5s(folder, FILES)
    assert after[FILES[0]] == before[FILES[0]]
    assert after[FILES[1]] == hashlib.md5(b"third!").hexdigest()
