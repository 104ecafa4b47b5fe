"""What all tests share. Before anything loads PyTorch: the same treatment of waiting threads as in the stages."""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser, sync_playwright

import stages  # noqa: F401

if TYPE_CHECKING:
    from tests.tiny_captioner import Tiny

# A browser that is driven has no use for what it would ask the network on its own.
FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "Tiny":
    """A small captioner and what it was trained on; tests leave it as it is."""
    from tests.tiny_captioner import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Give the machine's Chromium without a window, with a profile of its own; skip where there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine; on Debian, `apt-get install chromium` brings it")
    with sync_playwright() as playwright:
        # The sandbox works neither for root nor in most containers, and these pages are the tests' own.
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=False, args=FLAGS)
        yield browser
        browser.close()
