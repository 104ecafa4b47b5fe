"""Fixtures that several test modules share."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

import stages  # noqa: F401  # sets OpenMP's environment variables before anything imports PyTorch

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.dvc_repository import Repository
    from tests.tiny_captioner import Tiny

# The tests need no network, so the background services of the browser are off.
CHROMIUM_FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# Deadlines fail on machines that other processes share.
settings.register_profile("gridcap", deadline=None)
settings.load_profile("gridcap")

# Several test processes share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# In a repository without `core.analytics: false`, DVC would report its use over the network.
os.environ["DVC_NO_ANALYTICS"] = "true"

# A background job of a shell script ignores SIGINT, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "Tiny":
    """Train a small captioner on a small dataset. Tests must not change it."""
    from tests.tiny_captioner import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tokens and features of a small dataset (tests/tiny_dataset.py). Tests must not change it."""
    from tests.tiny_dataset import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def data_with_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the dataset `data` with captions without images. Tests must not change it."""
    from tests.tiny_dataset import TEXT, make_dataset

    return make_dataset(tmp_path_factory.mktemp("data_with_text"), TEXT)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> "Repository":
    """Copy the project into a repository in which every stage has run once. Tests must leave it as it was."""
    from tests.dvc_repository import STAGES, Repository

    repository = Repository.copy_project(tmp_path_factory.mktemp("uninterrupted"))
    assert repository.repro() == STAGES
    repository.commit()
    return repository


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    """Start headless Chromium with a new profile. Tests are skipped if Chromium or Playwright is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install 'gridcap[dev]'")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("Chromium is not installed. On Debian, run `apt-get install chromium`.")
    with playwright.sync_playwright() as driver:
        # The sandbox does not work as root or in most containers. The tests open only their own pages.
        browser = driver.chromium.launch(executable_path=path, chromium_sandbox=False, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()
