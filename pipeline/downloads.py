"""Downloads of large files: they resume, and a file appears under its final name only after it is verified."""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import requests
import urllib3
from tqdm import tqdm

from pipeline.artifacts import naming
from pipeline.errors import UserError

logger = logging.getLogger("gridcap")

TIMEOUT = 60.0
"""Seconds without data after which a connection is closed and opened again."""
MIN_RATE = 1024
"""Bytes per second, averaged over `TIMEOUT`, below which a connection is closed and opened again."""
MAX_FAILURES = 4
"""Connections in a row that may fail with less progress than `MIN_RATE` in `TIMEOUT`."""
RETRY_DELAY = 1.0
"""Seconds before the first retry; each further one waits twice as long."""

_CHUNK_SIZE = 2**20
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")
_HTTP_RANGE_NOT_SATISFIABLE = 416
_TRANSIENT_STATUSES = {408, 425, 429, *range(500, 600)}
_RUN_AGAIN = "Check the connection, then run again to resume."


class Digest(NamedTuple):
    """Digest of a file's bytes."""

    algorithm: str
    """Name of the algorithm in `hashlib`, such as sha256."""
    value: str
    """Hexadecimal digits, of which the last may be missing."""


class _ConnectionFailedError(Exception):
    """A connection failed in a way that another one may not."""


def download(url: str, path: Path, size: int | None, digest: Digest | None) -> None:
    """Download a file, unless it exists and has the digest.

    The bytes are received into `.NAME.partial`, which is renamed after it is verified. A later run resumes it, unless
    the server does not support ranges, or there is no digest that could show whether the file has changed since.

    Args:
        url: HTTP address of the file.
        path: The final name.
        size: Size of the file in bytes, if it is known.
        digest: Digest of the file, if it is known.

    Raises:
        UserError: The file cannot be downloaded, or has another size or digest. There is no file under the final name.
        OSError: The file cannot be written.
    """
    if path.is_file():
        if is_intact(path, size, digest):
            return
        logger.info("%s: has other bytes than expected (%s), downloading it again", path, _expected(size, digest))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    with naming(partial):
        partial.touch()
    with locked(partial):
        try:
            if digest is None:
                os.truncate(partial, 0)
            if size is None or partial.stat().st_size != size:
                _receive(url, path, size)
            if not is_intact(partial, size, digest):
                os.truncate(partial, 0)
                raise UserError(
                    f"{path}: {url} has other bytes than expected ({_expected(size, digest)}). The download was"
                    " deleted. Run again, or use another mirror."
                )
            os.replace(partial, path)
        finally:
            if partial.is_file() and not partial.stat().st_size:
                partial.unlink()


def partial_path(path: Path) -> Path:
    """Return the path of the unfinished download of a file."""
    return path.with_name(f".{path.name}.partial")


def is_intact(path: Path, size: int | None, digest: Digest | None) -> bool:
    """Whether a file has a size and a digest, as far as they are known."""
    if size is not None and path.stat().st_size != size:
        return False
    return digest is None or _compute_digest(path, digest.algorithm).startswith(digest.value)


def _compute_digest(path: Path, algorithm: str) -> str:
    """Compute a digest, with a progress bar on a terminal."""
    digest = hashlib.new(algorithm)
    with (
        path.open("rb") as file,
        progress_bar(f"verify {path.name.removeprefix('.')}", path.stat().st_size, 0) as progress,
    ):
        while chunk := file.read(_CHUNK_SIZE):
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()


def _expected(size: int | None, digest: Digest | None) -> str:
    facts = [] if size is None else [f"{size:,} bytes"]
    return ", ".join(facts if digest is None else [*facts, f"{digest.algorithm} {digest.value}"])


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock an existing file or folder for this process, where the file system supports it.

    Raises:
        UserError: Another process holds the lock.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: another process is downloading to it. Wait until it has ended.") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                raise
        yield
    finally:
        os.close(descriptor)


def _receive(url: str, path: Path, size: int | None) -> None:
    """Receive the missing bytes of a file. Failed connections are opened again as long as there is progress."""
    partial = partial_path(path)
    furthest, num_failures = partial.stat().st_size, 0
    if furthest:
        logger.info("%s: resuming at %s bytes", path, f"{furthest:,}")
    with requests.Session() as session:
        while True:
            try:
                return _receive_once(session, url, path, size)
            except (requests.RequestException, urllib3.exceptions.HTTPError, _ConnectionFailedError) as error:
                received = partial.stat().st_size
                if received > furthest + MIN_RATE * TIMEOUT:
                    furthest, num_failures = received, 0
                num_failures += 1
                if num_failures >= MAX_FAILURES or not _is_transient(error):
                    raise UserError(
                        f"{path}: cannot be downloaded from {url} ({_reason(error)}); {received:,} bytes are kept."
                        f" {_RUN_AGAIN}"
                    ) from error
                logger.info("%s: %s. Connecting again.", path, _reason(error))
                time.sleep(RETRY_DELAY * 2 ** (num_failures - 1))


def _receive_once(session: requests.Session, url: str, path: Path, size: int | None) -> None:
    """Receive the missing bytes over one connection.

    Raises:
        _ConnectionFailedError: The connection ended early, is too slow, or the server is overloaded.
        UserError: The server has no such file, or one of another size.
    """
    partial = partial_path(path)
    offset = partial.stat().st_size
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        content_range = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
        if offset and response.status_code == _HTTP_RANGE_NOT_SATISFIABLE:
            if content_range is not None and content_range[2] == str(offset):
                return  # all bytes were received before
            os.truncate(partial, 0)
            raise _ConnectionFailedError("the server has fewer bytes than were received, so the download starts again")
        _require_file(response, url, path)
        if offset and (content_range is None or content_range[1] != str(offset)):
            logger.info("%s: the server does not support ranges, so the download starts again", path)
            offset = 0
        length = response.headers.get("Content-Length", "")
        total = offset + int(length) if length.isdecimal() else size
        if size is not None and total != size:
            raise UserError(
                f"{path}: {url} has {total:,} bytes, but {size:,} are expected. Use another mirror, or correct the"
                " recipe."
            )
        free = shutil.disk_usage(partial.parent).free
        if total is not None and total - offset > free:
            raise UserError(
                f"{path}: {total - offset:,} bytes are needed, but {free:,} are free. Free disk space, then run again."
            )
        with naming(partial), partial.open("r+b") as file, progress_bar(path.name, total, offset) as progress:
            file.truncate(offset)
            file.seek(offset)
            for chunk in _chunks(response):
                if total is not None and file.tell() + len(chunk) > total:
                    raise UserError(f"{path}: {url} sends more than {total:,} bytes. Use another mirror.")
                file.write(chunk)
                progress.update(len(chunk))
            received = file.tell()
            file.flush()
            os.fsync(file.fileno())
    if total is not None and received != total:
        raise _ConnectionFailedError(f"the connection was closed after {received:,} of {total:,} bytes")


def _require_file(response: requests.Response, url: str, path: Path) -> None:
    """Check that a response is a file, neither an error nor a page for people."""
    status = f"HTTP status {response.status_code} {response.reason}"
    if response.status_code in _TRANSIENT_STATUSES:
        raise _ConnectionFailedError(status)
    if response.status_code not in (requests.codes.ok, requests.codes.partial_content):
        raise UserError(f"{path}: cannot be downloaded from {url} ({status}). Use another mirror.")
    if response.headers.get("Content-Type", "").startswith(("text/html", "application/xhtml")):
        raise UserError(
            f"{path}: {url} leads to a web page ({response.url}) instead of a file, such as a login. Download the file"
            " with a browser."
        )


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """Yield the body of a response as it arrives.

    Raises:
        _ConnectionFailedError: The bytes arrive too slowly.
    """
    start, received = time.monotonic(), 0
    while chunk := response.raw.read1(_CHUNK_SIZE):
        yield chunk
        received += len(chunk)
        elapsed = time.monotonic() - start
        if elapsed >= TIMEOUT:
            if received < MIN_RATE * elapsed:
                raise _ConnectionFailedError(f"the server sent {received:,} bytes in {elapsed:.0f} s")
            start, received = time.monotonic(), 0


def progress_bar(desc: str, total: int | None, initial: int) -> Any:
    """Make a progress bar with rate and remaining time; it is shown on a terminal only."""
    return tqdm(desc=desc, total=total, initial=initial, unit="B", unit_scale=True, leave=False, disable=None)


def _is_transient(error: Exception) -> bool:
    """Whether another connection may succeed, unlike after an invalid address, certificate or chain of redirects."""
    return not isinstance(error, ValueError | requests.exceptions.SSLError | requests.TooManyRedirects)


def _reason(error: Exception) -> str:
    """Describe a failed connection by its cause, without the names of Python objects."""
    match error:
        case requests.Timeout() | urllib3.exceptions.TimeoutError():
            return f"no data for {TIMEOUT:g} s"
        case requests.exceptions.SSLError():
            return "the certificate of the server is not valid"
        case requests.ConnectionError() | urllib3.exceptions.HTTPError():
            return "the connection failed or was closed"
        case _:
            return str(error).rstrip(".")
