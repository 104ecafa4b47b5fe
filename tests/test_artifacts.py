import errno
import fcntl
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typing_extensions import TypedDict

from pipeline import artifacts
from pipeline.artifacts import (
    Schema,
    file_digests,
    fingerprint,
    fresh_folder,
    original_path,
    publish,
    publish_together,
    read_document,
    read_document_in_parts,
    read_json,
    work_folder,
    write_atomically,
    write_document,
    write_json,
)
from pipeline.errors import UserError
from tests.paths import ROOT


def test_a_fingerprint_depends_on_every_part_but_not_on_their_order() -> None:
    assert fingerprint(a=1, b=[2.5, None]) == fingerprint(b=[2.5, None], a=1)
    assert fingerprint(a=1) != fingerprint(a=2) != fingerprint(b=2)


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"


def test_writing_nan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"score": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_publish_replaces_a_folder_and_keeps_the_source(tmp_path: Path) -> None:
    source, target = tmp_path / "work", tmp_path / "out" / "model"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "new").write_text("new")
    target.mkdir(parents=True)
    (target / "old").write_text("old")
    publish(source, target)
    assert [path.relative_to(target).as_posix() for path in sorted(target.rglob("*"))] == ["deep", "deep/new"]
    assert (source / "deep" / "new").samefile(target / "deep" / "new")
    assert list(target.parent.iterdir()) == [target]


def test_publish_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("new")
    (tmp_path / "out").write_text("old")
    publish(tmp_path / "work", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "new"


def test_leftovers_of_a_killed_publish_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.staged").mkdir()
    (tmp_path / ".out.staged" / "half").write_text("half")
    (tmp_path / ".out.retired").mkdir()
    (tmp_path / "work").mkdir()
    publish(tmp_path / "work", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "work"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_fresh_folder_is_removed_after_an_error(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), fresh_folder(tmp_path / "out") as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == []


HOLDER = """
import logging, sys, time
from pathlib import Path
from pipeline.artifacts import work_folder
logging.basicConfig(level=logging.INFO)
with work_folder(Path(sys.argv[1]), "train", "abc"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_second_process_waits_for_the_lock_holder_and_continues_when_it_is_killed(tmp_path: Path) -> None:
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
            assert second.stdout.readline() == "held\n"
            second.kill()


def test_a_work_folder_keeps_its_files(tmp_path: Path) -> None:
    with work_folder(tmp_path, "encode", "abc") as folder:
        (folder / "shard").write_text("whole")
    with work_folder(tmp_path, "encode", "abc") as reopened:
        assert (reopened / "shard").read_text() == "whole"
    with work_folder(tmp_path, "encode", "other") as other:
        assert list(other.iterdir()) == []


def test_a_fresh_folder_replaces_that_of_a_killed_run(tmp_path: Path) -> None:
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


REMEDY = "Run something."


def test_a_byte_order_mark_of_json_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('\ufeff{"schema": "gridcap.test", "schema_version": 3, "1": [2]}', encoding="utf-8")
    assert read_json(path, dict[str, object], REMEDY, Schema("gridcap.test", 3))["1"] == [2]


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (None, ["no such file"]),
        (b"", ["EOF"]),
        (b'{"values": [1, 2', ["EOF", "line 1"]),
        (b"\xff\xfe", ["JSON"]),
        (b"[" * 100_000, ["recursion"]),
        (b'{"values": [1]}', ["schema"]),
        (b'{"values": [1], "\xff": 1}', ["unicode"]),
        (b'{"values": [1], "\\ud800": 1}', ["hex escape"]),
        (b'{"values": [1' + b"0" * 5000 + b"]}", ["out of range"]),
        (b'{"schema": "gridcap.test", "schema_version": 1, "values": [1], "values": [2]}', ["two values", '"values"']),
        (b'{"schema": "gridcap.other", "schema_version": 1, "values": [1]}', ["gridcap.other", "gridcap.test"]),
        (b'{"schema": "gridcap.test", "schema_version": 2, "values": [1]}', ["version 2", "version 1"]),
        (b'{"schema": "gridcap.test", "schema_version": 1, "values": [1, "x"]}', ["values[1]", "integer"]),
        (b'{"schema": "gridcap.test", "schema_version": 1, "values": [1, true]}', ["values[1]", "integer"]),
    ],
)
def test_an_invalid_json_file_is_an_error_with_location_and_remedy(
    tmp_path: Path, content: bytes | None, facts: list[str]
) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path, Numbers, REMEDY, Schema("gridcap.test", 1))
    assert [fact for fact in [str(path), REMEDY, *facts] if fact not in str(caught.value)] == []


class Numbers(TypedDict):
    values: list[int]


def failing(number: int) -> Callable[..., NoReturn]:
    """Return a function of the system that fails without the name of a file."""

    def fail(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_work_folder_without_file_locks_is_used_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with caplog.at_level(logging.WARNING), work_folder(tmp_path, "encode", "abc") as folder:
        (folder / "shard").write_text("whole")
    [message] = [record.getMessage() for record in caplog.records]
    assert [fact for fact in ["encode", str(folder), "second process"] if fact not in message] == []


def test_another_error_of_a_lock_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match="abc") as caught, work_folder(tmp_path, "encode", "abc"):
        pass
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_sync_names_the_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(OSError, match=r"file\.json") as caught:
        write_atomically(tmp_path / "file.json", "text")
    assert caught.value.errno == number
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_sync_folders_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def fail_for_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            failing(errno.EINVAL)()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    write_atomically(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def make_version(folder: Path, version: int) -> Path:
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "version", str(version))
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux exchanges folders in one step")
def test_a_published_folder_exists_at_every_instant(tmp_path: Path) -> None:
    target = tmp_path / "out"
    publish(make_version(tmp_path / "work", 0), target)
    if not artifacts._exchange(target, tmp_path / "work"):
        pytest.skip("this file system cannot exchange folders")
    absences = []
    finished = threading.Event()

    def watch() -> None:
        while not finished.is_set():
            if not target.is_dir():
                absences.append(target)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for version in range(1, 50):
        publish(make_version(tmp_path / "work", version), target)
        assert (target / "version").read_text() == str(version)
    finished.set()
    watcher.join()
    assert absences == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "work"]


def test_a_folder_is_published_where_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_exchange", lambda a, b: False)
    for version in range(2):
        publish(make_version(tmp_path / "work", version), tmp_path / "out")
        assert (tmp_path / "out" / "version").read_text() == str(version)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "work"]


def test_a_failed_copy_leaves_the_old_version_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(make_version(tmp_path / "work", 0), tmp_path / "out")
    monkeypatch.setattr(os, "link", failing(errno.ENOTSUP))
    monkeypatch.setattr(shutil, "copyfile", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="version"):
        publish(make_version(tmp_path / "work", 1), tmp_path / "out")
    assert (tmp_path / "out" / "version").read_text() == "0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "work"]


def make_outputs(folder: Path, version: int) -> dict[Path, Path]:
    """Write a version of three outputs, and return the sources by final name."""
    sources = folder.parent / "sources"
    sources.mkdir(exist_ok=True)
    for name in ("first.json", "last.html"):
        write_atomically(sources / name, str(version))
    make_version(sources / "middle", version)
    return {folder / name: sources / name for name in ("first.json", "middle", "last.html")}


def read_outputs(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("exchanges", [True, False])
def test_several_outputs_are_published_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(artifacts, "_exchange", lambda a, b: False)
    for version in ("0", "1"):
        publish_together(make_outputs(tmp_path / "out", int(version)))
        assert read_outputs(tmp_path / "out") == dict.fromkeys(("first.json", "middle/version", "last.html"), version)


PUBLISH_AND_KILL = """
import os, signal, sys
from pathlib import Path
from pipeline import artifacts

def kill_after(function):
    def wrapped(*arguments):
        result = function(*arguments)
        renames.append(arguments)
        if len(renames) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

sources, out = map(Path, sys.argv[1:3])
renames = []
os.replace, artifacts._exchange = kill_after(os.replace), kill_after(artifacts._exchange)
artifacts.publish_together({out / name: sources / name for name in ("first.json", "middle", "last.html")})
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_renames", [1, 2, 3])
def test_a_kill_between_the_renames_leaves_whole_outputs_and_the_next_run_replaces_all(
    tmp_path: Path, num_renames: int
) -> None:
    publish_together(make_outputs(tmp_path / "out", 0))
    sources = make_outputs(tmp_path / "out", 1)
    command = [sys.executable, "-c", PUBLISH_AND_KILL, tmp_path / "sources", tmp_path / "out", str(num_renames)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    versions = [read_outputs(tmp_path / "out")[name] for name in ("first.json", "middle/version", "last.html")]
    assert versions == ["1"] * num_renames + ["0"] * (3 - num_renames)
    publish_together(sources)
    assert read_outputs(tmp_path / "out") == dict.fromkeys(("first.json", "middle/version", "last.html"), "1")


@pytest.mark.parametrize("num_copies", range(3))
def test_a_disk_that_is_full_before_the_last_copy_leaves_every_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_copies: int
) -> None:
    publish_together(make_outputs(tmp_path / "out", 0))
    outputs = make_outputs(tmp_path / "out", 1)
    copyfile, copied = shutil.copyfile, []

    def fill(source: Path, target: Path) -> None:
        if len(copied) == num_copies:
            failing(errno.ENOSPC)()
        copied.append(copyfile(source, target))

    monkeypatch.setattr(os, "link", failing(errno.ENOTSUP))
    monkeypatch.setattr(shutil, "copyfile", fill)
    with pytest.raises(OSError, match=("first", "version", "last")[num_copies]):
        publish_together(outputs)
    assert read_outputs(tmp_path / "out") == dict.fromkeys(("first.json", "middle/version", "last.html"), "0")


def test_a_folder_in_place_of_a_file_is_an_error_before_anything_is_published(tmp_path: Path) -> None:
    publish_together(make_outputs(tmp_path / "out", 0))
    (tmp_path / "out" / "last.html").unlink()
    (tmp_path / "out" / "last.html").mkdir()
    with pytest.raises(IsADirectoryError, match=r"last\.html"):
        publish_together(make_outputs(tmp_path / "out", 1))
    assert read_outputs(tmp_path / "out") == dict.fromkeys(("first.json", "middle/version"), "0")


def test_an_old_folder_returns_if_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(make_version(tmp_path / "work", 0), tmp_path / "out")
    replace = os.replace

    def fail_for_staged(source: Path, target: Path) -> None:
        if source.name == ".out.staged":
            failing(errno.EIO)()
        replace(source, target)

    monkeypatch.setattr(artifacts, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "replace", fail_for_staged)
    source = make_version(tmp_path / "work", 1)
    with pytest.raises(OSError, match="Input/output"):
        publish(source, tmp_path / "out")
    assert (tmp_path / "out" / "version").read_text() == "0"


def test_a_path_in_the_workspace_of_an_experiment_maps_to_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / ".dvc/tmp/exps/standalone/tmp1"
    (workspace / ".dvc").mkdir(parents=True)
    work, unrelated = Path("data/.work"), tmp_path.parent / "data/.work"
    monkeypatch.chdir(workspace)
    assert original_path(work) == work

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert original_path(work) == tmp_path / work
    assert original_path(tmp_path / work) == tmp_path / work
    assert original_path(unrelated) == unrelated
    with work_folder(work, "encode", "0") as folder:
        assert folder == tmp_path / work / "encode/0"


@pytest.mark.parametrize("indent", [None, 2])
def test_every_altered_byte_of_a_document_is_noticed(tmp_path: Path, indent: int | None) -> None:
    path, schema = tmp_path / "a.json", Schema("test", 1)
    value = {"b": [1, 2.5, None, "é"], "10": {"9": True}}
    write_document(path, schema, value, indent)
    read = {**schema.header, **value}
    assert read_document(path, dict[str, object], "Redo it.", schema).items() >= read.items()
    content = path.read_bytes()
    for index, byte in enumerate(content):
        path.write_bytes(content[:index] + bytes([byte ^ 1]) + content[index + 1 :])
        with suppress(UserError):
            assert read_document(path, dict[str, object], "Redo it.", schema).items() >= read.items()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1" * 400, '"\\ud800"', "[" * 99 + "]" * 99])
def test_any_key_added_to_a_document_is_noticed(tmp_path: Path, value: str) -> None:
    path, schema = tmp_path / "a.json", Schema("test", 1)
    write_document(path, schema, {"a": 1})
    path.write_text(path.read_text().replace("{", f'{{"z": {value},', 1))
    with pytest.raises(UserError, match=r"a\.json: .*Redo it\.") as error:
        read_document(path, dict[str, object], "Redo it.", schema)
    assert "\n" not in str(error.value)


LARGE = {str(i): [[i, 0]] for i in (3, 10, 11, 7, 25)}


class Large(TypedDict):
    note: str
    large: dict[str, Any]
    z: list[dict[str, str]]


def write_large(path: Path, large: dict[str, Any], indent: int | None = None) -> Large:
    value: Large = {"note": 'no "large": {"3": 1, "4": 2}', "large": large, "z": [{"b": "é"}]}
    write_document(path, Schema("test", 1), dict(value), indent)
    return value


def read_large(path: Path) -> list[Large]:
    return list(read_document_in_parts(path, Large, "Redo it.", Schema("test", 1), "large"))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_large_object_is_read_in_parts_and_every_altered_byte_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    monkeypatch.setattr(artifacts, "_MEMBERS_PER_PART", 2)
    path = tmp_path / "a.json"
    written = write_large(path, LARGE, indent)

    def check() -> None:
        parts = read_large(path)
        assert [list(part["large"]) for part in parts] == [["3", "10"], ["11", "7"], ["25"]]
        assert {name: value for part in parts for name, value in part["large"].items()} == LARGE
        assert all({**part, "large": LARGE} == written for part in parts)

    check()
    content = path.read_bytes()
    for index, byte in enumerate(content):
        path.write_bytes(content[:index] + bytes([byte ^ 1]) + content[index + 1 :])
        with suppress(UserError):
            check()


@pytest.mark.parametrize("value", [{}, {"1": {"2": 3}, "4": {"5": 6}, "7": 8}])
def test_a_large_object_that_cannot_be_split_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: dict[str, Any]
) -> None:
    monkeypatch.setattr(artifacts, "_MEMBERS_PER_PART", 1)
    write_large(tmp_path / "a.json", value)

    assert [part["large"] for part in read_large(tmp_path / "a.json")] == [value]


def test_a_key_in_two_parts_of_a_large_object_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_MEMBERS_PER_PART", 2)
    path = tmp_path / "a.json"
    write_large(path, LARGE)
    path.write_text(path.read_text().replace('"25"', '"3"'))

    with pytest.raises(UserError, match=r'a\.json: has two values of the key "3"\. Redo it\.'):
        read_large(path)


def test_files_are_digested_in_their_order(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}" for i in range(100)]
    for i, path in enumerate(paths):
        path.write_bytes(b"x" * 2000 * i)
    paths[50].unlink()

    digests = file_digests(paths, "digests", "file", num_threads=3)

    assert isinstance(digests.pop(50), FileNotFoundError)
    del paths[50]
    assert digests == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
