"""Downloads from a real server on loopback, which fails as servers do."""

import hashlib
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import downloads
from pipeline.downloads import Digest, download, locked, partial_path
from pipeline.errors import UserError
from tests.file_server import FileServer, file_server
from tests.paths import ROOT

CONTENT = bytes(range(256)) * 400
SHA256 = Digest("sha256", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(downloads, "RETRY_DELAY", 0.001)
    monkeypatch.setattr(downloads, "MIN_RATE", 0)
    with file_server() as server:
        server.files["a.zip"] = CONTENT
        yield server


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "archives" / "a.zip"


def fetch(
    server: FileServer, path: Path, size: int | None = len(CONTENT), digest: Digest | None = SHA256, name: str = "a.zip"
) -> None:
    download(f"{server.address}/{name}", path, size, digest)


def leftovers(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent))


@pytest.mark.parametrize("size", [None, len(CONTENT)])
@pytest.mark.parametrize("digest", [None, SHA256, Digest("md5", hashlib.md5(CONTENT).hexdigest())])
def test_a_file_is_downloaded_once(server: FileServer, path: Path, size: int | None, digest: Digest | None) -> None:
    fetch(server, path, size, digest)
    fetch(server, path, size, digest)
    assert path.read_bytes() == CONTENT
    assert leftovers(path) == ["a.zip"]
    assert server.requests == [("a.zip", None)]


def test_a_cut_connection_is_opened_again_where_it_ended(server: FileServer, path: Path) -> None:
    server.cuts = [1000, 2000, 30_000, 1, 40_000]
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert [byte_range for _, byte_range in server.requests] == [
        None,
        *(f"bytes={start}-" for start in (1000, 3000, 33_000, 33_001, 73_001)),
    ]


def test_a_server_without_ranges_starts_the_file_again_and_says_so(
    server: FileServer, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gridcap")
    server.cuts, server.ranges = [1000, 900, 800], False
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert caplog.text.count("a.zip: the server does not support ranges, so the download starts again") == 3


def test_a_server_without_ranges_that_always_cuts_is_an_error(server: FileServer, path: Path) -> None:
    server.cuts, server.ranges = [1000] * 100, False
    with pytest.raises(UserError, match=r"was closed\); 1,000 bytes are kept"):
        fetch(server, path)
    assert len(server.requests) == downloads.MAX_FAILURES
    assert leftovers(path) == [".a.zip.partial"]


def test_a_later_run_resumes(server: FileServer, path: Path) -> None:
    server.cuts = [5000, 0, 0, 0]
    with pytest.raises(UserError, match=r"a\.zip: cannot be downloaded from http.* 5,000 bytes are kept\. .*resume"):
        fetch(server, path)
    assert not path.exists()
    server.requests.clear()
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    assert server.requests == [("a.zip", "bytes=5000-")]


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_a_run_that_was_killed_before_the_rename_only_verifies(
    server: FileServer, path: Path, size: int | None
) -> None:
    path.parent.mkdir()
    partial_path(path).write_bytes(CONTENT)
    fetch(server, path, size)
    assert path.read_bytes() == CONTENT
    assert leftovers(path) == ["a.zip"]
    assert server.requests == ([("a.zip", f"bytes={len(CONTENT)}-")] if size is None else [])


def test_a_partial_file_that_is_too_long_starts_again(server: FileServer, path: Path) -> None:
    path.parent.mkdir()
    partial_path(path).write_bytes(CONTENT + b"more")
    fetch(server, path)
    assert path.read_bytes() == CONTENT


def test_a_file_that_changed_since_is_never_mixed(server: FileServer, path: Path) -> None:
    path.parent.mkdir()
    partial_path(path).write_bytes(b"older version")
    with pytest.raises(UserError, match="has other bytes than expected"):
        fetch(server, path)
    assert leftovers(path) == []
    partial_path(path).write_bytes(b"older version")
    fetch(server, path, None, None)
    assert path.read_bytes() == CONTENT


def test_a_wrong_digest_leaves_no_file(server: FileServer, path: Path) -> None:
    with pytest.raises(UserError) as error:
        fetch(server, path, digest=Digest("md5", "0" * 32))
    for fact in (str(path), f"{server.address}/a.zip", "102,400 bytes, md5 0000", "mirror"):
        assert fact in str(error.value)
    assert leftovers(path) == []


def test_a_wrong_size_is_noticed_before_a_byte_is_received(server: FileServer, path: Path) -> None:
    with pytest.raises(UserError, match="has 102,400 bytes, but 102,401 are expected"):
        fetch(server, path, len(CONTENT) + 1)
    assert leftovers(path) == []


def test_a_server_that_sends_too_much_is_stopped(server: FileServer, path: Path) -> None:
    server.lengths = False
    with pytest.raises(UserError, match="sends more than 1,000 bytes"):
        fetch(server, path, 1000)
    assert leftovers(path) == []


def test_a_file_without_a_length_is_downloaded(server: FileServer, path: Path) -> None:
    server.lengths = False
    server.cuts = [1000]
    fetch(server, path)
    assert path.read_bytes() == CONTENT


def test_a_file_that_is_larger_than_the_disk_is_not_received(server: FileServer, path: Path) -> None:
    server.claimed_length = 2**60
    with pytest.raises(UserError, match="1,152,921,504,606,846,976 bytes are needed, but "):
        fetch(server, path, None)
    assert leftovers(path) == []


def test_a_damaged_file_is_downloaded_again(server: FileServer, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(CONTENT[:-1] + b"x")
    fetch(server, path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_an_http_error_is_one_sentence(server: FileServer, path: Path, status: int) -> None:
    server.statuses = [status]
    with pytest.raises(UserError, match=rf"a\.zip: cannot be downloaded from .*a\.zip \(HTTP status {status} "):
        fetch(server, path)
    assert leftovers(path) == []
    assert len(server.requests) == 1


def test_a_request_to_an_overloaded_server_is_repeated(server: FileServer, path: Path) -> None:
    server.statuses = [503, 429, 500]
    fetch(server, path)
    assert path.read_bytes() == CONTENT
    path.unlink()
    server.statuses = [503] * 4
    with pytest.raises(UserError, match="HTTP status 503"):
        fetch(server, path)


def test_a_redirect_to_a_login_page_is_an_error(server: FileServer, path: Path) -> None:
    server.login_page = True
    with pytest.raises(UserError, match=r"leads to a web page \(http://127\.0\.0\.1:\d+/login\).*such as a login"):
        fetch(server, path, None, None)
    assert leftovers(path) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.zip", "a.zip", "ftp://127.0.0.1/a.zip", "http://[::1/a.zip"])
def test_an_address_that_cannot_be_reached_is_an_error(path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "RETRY_DELAY", 0.001)
    with pytest.raises(UserError, match=r"a\.zip: cannot be downloaded from ") as error:
        download(url, path, None, SHA256)
    assert "object at 0x" not in str(error.value)
    assert leftovers(path) == []


def test_a_server_that_sends_nothing_times_out(server: FileServer, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT", 0.05)
    monkeypatch.setattr(downloads, "MIN_RATE", 1024)
    server.delay = 5
    start = time.monotonic()
    with pytest.raises(UserError, match=r"no data for 0\.05 s"):
        fetch(server, path)
    assert time.monotonic() - start < 4


def test_a_trickle_times_out(server: FileServer, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT", 0.05)
    monkeypatch.setattr(downloads, "MIN_RATE", 10_000_000)
    monkeypatch.setattr(downloads, "MAX_FAILURES", 1)
    server.delay = 0.004
    start = time.monotonic()
    with pytest.raises(UserError, match=r"the server sent \d+ bytes in 0 s\); \d+ bytes are kept"):
        fetch(server, path)
    assert time.monotonic() - start < 2
    assert CONTENT.startswith(partial_path(path).read_bytes())


def test_a_full_disk_keeps_what_was_received(server: FileServer, path: Path) -> None:
    # A limit of the file size fails like a full disk, and needs no mount.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            fetch(server, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(partial_path(path))
    assert leftovers(path) == [".a.zip.partial"]
    fetch(server, path)
    assert path.read_bytes() == CONTENT


def test_two_processes_do_not_write_one_file(server: FileServer, path: Path) -> None:
    path.parent.mkdir()
    partial_path(path).touch()
    with locked(partial_path(path)), pytest.raises(UserError, match="another process is downloading"):
        fetch(server, path)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_process_resumes(server: FileServer, path: Path, signum: int) -> None:
    server.delay = 0.001
    arguments = f"{server.address + '/a.zip'!r}, Path({str(path)!r}), None, Digest(*{tuple(SHA256)!r})"
    program = (
        "from pathlib import Path\nfrom pipeline import errors\nfrom pipeline.downloads import Digest, download\n"
        f"errors.run(lambda: download({arguments}))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not server.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=30)
    if signum == signal.SIGINT:
        assert (process.returncode, stderr) == (130, "interrupted\n")
        assert partial_path(path).stat().st_size > 0
    assert leftovers(path) == [".a.zip.partial"]
    server.delay = 0
    fetch(server, path)
    assert path.read_bytes() == CONTENT
