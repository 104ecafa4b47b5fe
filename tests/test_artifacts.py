import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.artifacts import fingerprint, fresh_folder, publish, work_folder, write_atomically, write_json


def test_a_fingerprint_depends_on_every_part_and_not_on_their_order() -> None:
    assert fingerprint(a=1, b=[2.5, None]) == fingerprint(b=[2.5, None], a=1)
    assert fingerprint(a=1) != fingerprint(a=2) != fingerprint(b=2)


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"


def test_nan_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"score": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_publishing_replaces_a_folder_whole_and_keeps_the_source(tmp_path: Path) -> None:
    source, target = tmp_path / "work", tmp_path / "out" / "model"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "new").write_text("new")
    target.mkdir(parents=True)
    (target / "old").write_text("old")
    publish(source, target)
    assert [path.relative_to(target).as_posix() for path in sorted(target.rglob("*"))] == ["deep", "deep/new"]
    assert (source / "deep" / "new").samefile(target / "deep" / "new")
    assert list(target.parent.iterdir()) == [target]


def test_publishing_replaces_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("new")
    (tmp_path / "out").write_text("old")
    publish(tmp_path / "work", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "new"


def test_what_a_killed_publication_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".out.staged").mkdir()
    (tmp_path / ".out.staged" / "half").write_text("half")
    (tmp_path / ".out.retired").mkdir()
    (tmp_path / "work").mkdir()
    publish(tmp_path / "work", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "work"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_fresh_folder_is_gone_after_an_error(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), fresh_folder(tmp_path / "out") as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == []


HOLDER = """
import sys, time
from pathlib import Path
from pipeline.artifacts import work_folder
with work_folder(Path(sys.argv[1]), "train", "abc"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_says_whom_it_waits_for_and_goes_on_when_that_is_killed(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start() as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with start() as second:
            assert second.stdout is not None
            assert second.stderr is not None
            assert f"waiting for process {first.pid}" in second.stderr.readline()
            os.kill(first.pid, signal.SIGKILL)
            began = time.monotonic()
            assert second.stdout.readline() == "held\n"
            assert time.monotonic() - began < 10
            second.kill()


def test_work_survives_from_one_opening_to_the_next(tmp_path: Path) -> None:
    with work_folder(tmp_path, "encode", "abc") as folder:
        (folder / "shard").write_text("whole")
    with work_folder(tmp_path, "encode", "abc") as again:
        assert (again / "shard").read_text() == "whole"
    with work_folder(tmp_path, "encode", "other") as other:
        assert list(other.iterdir()) == []


def test_a_fresh_folder_takes_away_what_a_kill_left(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom pipeline.artifacts import fresh_folder\n"
        "with fresh_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], cwd=Path(__file__).parents[1], check=False)
    assert [path.name for path in tmp_path.rglob("half")] == ["half"]
    with fresh_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
