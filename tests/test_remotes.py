"""DVC remotes: artifacts travel to another clone through an S3 server on the loopback interface."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.features.store import FeatureStore
from tests.dvc_repository import Repository

pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("moto", "flask", "dvc_s3"))), reason="needs moto and dvc[s3]"
    ),
]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start an S3 server with an empty bucket, and return the bucket's URL."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/bucket"
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "server.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            create_bucket(url, server)
            yield url
        finally:
            server.terminate()


def create_bucket(url: str, server: "subprocess.Popen[bytes]") -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()
            return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError("the S3 server has ended")


def stored_objects(url: str) -> dict[str, str]:
    """Return the time of the upload of each object in a bucket."""
    with urllib.request.urlopen(f"{url}?list-type=2") as response:
        listing = response.read().decode()
    return dict(re.findall(r"<Key>([^<]+)</Key>\s*<LastModified>([^<]+)<", listing))


def test_an_interrupted_push_continues_and_another_clone_runs_nothing(
    repository: Repository, tmp_path: Path, bucket: str
) -> None:
    first = repository.clone(tmp_path / "first")
    first.dvc("config", "--local", "cache.dir", str(repository.folder / ".dvc/cache"))
    first.dvc("remote", "add", "--default", "shared", "s3://bucket/gridcap")
    first.dvc("remote", "modify", "shared", "endpointurl", bucket.removesuffix("/bucket"))
    first.commit()

    with first.start("push", "--jobs", "1") as push:
        while push.poll() is None and len(stored_objects(bucket)) < 5:
            time.sleep(0.01)
        os.killpg(push.pid, signal.SIGKILL)
    uploaded = stored_objects(bucket)
    first.dvc("push")
    stored = stored_objects(bucket)
    assert 5 <= len(uploaded) < len(stored)
    assert uploaded.items() <= stored.items()

    second = first.clone(tmp_path / "second")
    second.dvc("pull")
    assert second.repro() == []
    assert FeatureStore(second.folder / "data/features").verify() == 1
    assert second.locks() == repository.locks()
    assert (second.folder / "results/report.html").is_file()
