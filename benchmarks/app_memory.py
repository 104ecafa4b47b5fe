"""Memory of the server of `gridcap app` under load, in Chromium.

The app serves a ResNet-50 captioner with random weights. Each load begins with the memory that the previous load left.
`VmHWM` of the kernel is the peak; it is reset before each load.
"""

import re
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.app import TIMEOUT, serve_app, wait_for_image, write_model
from benchmarks.workloads import random_jpeg

NUM_CAPTIONS = 200
NUM_UPLOADS = 100
NUM_UNREQUESTED_UPLOADS = 60
NUM_SESSIONS = 20
UPLOAD_SIZE = 19 * 2**20  # bytes
BOMB_SIDE = 8900  # px


def main() -> None:
    """Print the memory of the server before, during and after each load."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        print("app_memory: skipped, Chromium is not installed")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = list(write_uploads(folder))
        bomb = folder / "bomb.png"
        bomb.write_bytes(gray16_png(BOMB_SIDE))
        with serve_app(write_model(folder), folder) as (url, pid), sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, chromium_sandbox=False)
            page = open_page(browser, url)
            print("memory of the server, MB")
            print(f"{'load':>42} {'answers':>24} {'seconds':>8} {'before':>7} {'peak':>7} {'after':>7}")
            wait_for_caption(page)
            measure(pid, f"{NUM_CAPTIONS} captions", lambda: caption_samples(page))
            measure(pid, f"{NUM_UPLOADS} uploads of 19 MB", lambda: upload_files(page, files))
            measure(pid, f"{NUM_UNREQUESTED_UPLOADS} unrequested uploads", lambda: upload_unrequested(page, files[0]))
            measure(pid, f"PNG of {BOMB_SIDE} x {BOMB_SIDE} px, 16 bits", lambda: upload_bomb(page, bomb))
            page.context.close()
            pages = [open_page(browser, url) for _ in range(NUM_SESSIONS)]
            for page in pages:
                wait_for_caption(page)
            measure(pid, f"{NUM_SESSIONS} sessions, 19 MB each, at once", lambda: upload_at_once(pages, files))
            browser.close()


def write_uploads(folder: Path) -> Iterator[Path]:
    """Write JPEGs of `UPLOAD_SIZE` bytes, most of them after the end of the image, where decoders do not read."""
    for i in range(NUM_SESSIONS):
        jpeg = random_jpeg(i, 640, 480)
        path = folder / f"{i}.jpg"
        path.write_bytes(jpeg + bytes(UPLOAD_SIZE - len(jpeg)))
        yield path


def gray16_png(side: int) -> bytes:
    """Make a square 16-bit gray PNG, which compresses to 0.2 MB."""
    rows = zlib.compress(bytes((1 + 2 * side) * side))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def measure(pid: int, label: str, load: Callable[[], str]) -> None:
    """Run a load and print the memory of the server before, during and after it."""
    before = memory(pid, "VmRSS")
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM
    start = time.perf_counter()
    answers = load()
    seconds = time.perf_counter() - start
    peak, after = memory(pid, "VmHWM"), memory(pid, "VmRSS")
    print(f"{label:>42} {answers:>24} {seconds:>8.1f} {before:>7.0f} {peak:>7.0f} {after:>7.0f}", flush=True)


def memory(pid: int, key: str) -> float:
    """Return a number of the kernel about the memory of a process, in MB."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) * 1024 / 1e6


def open_page(browser: Any, url: str) -> Any:
    """Open the app in a new session."""
    page = browser.new_context().new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(url)
    return page


def wait_for_caption(page: Any) -> None:
    """Wait until a page shows a caption."""
    page.locator(".caption .word").first.wait_for()


def caption_samples(page: Any) -> str:
    """Click sample after sample."""
    samples = page.locator(".samples button").all()
    for i in range(NUM_CAPTIONS):
        wait_for_image(page, samples[(i + 1) % len(samples)].click)
    return f"{NUM_CAPTIONS} captions"


def upload_files(page: Any, files: list[Path]) -> str:
    """Upload one file after the other in one session."""
    file_input = page.locator("input[type=file]").first
    for i in range(NUM_UPLOADS):
        path = files[i % len(files)]
        wait_for_image(page, partial(file_input.set_input_files, path))
    return f"{NUM_UPLOADS} captions"


def upload_unrequested(page: Any, path: Path) -> str:
    """Upload to the session of a page, under file ids that the server did not issue."""
    with page.expect_request(lambda request: request.method == "PUT") as upload:
        wait_for_image(page, lambda: page.locator("input[type=file]").first.set_input_files(path))
    url = urlsplit(upload.value.url)
    cookies = {cookie["name"]: cookie["value"] for cookie in page.context.cookies()}
    headers = {
        "Content-Type": "multipart/form-data; boundary=b",
        "Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items()),
        "X-Xsrftoken": cookies.get("_streamlit_xsrf", ""),
    }
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
    body = head + path.read_bytes() + b"\r\n--b--\r\n"
    statuses = []
    for i in range(NUM_UNREQUESTED_UPLOADS):
        connection = HTTPConnection(url.netloc, timeout=60)
        with suppress(BrokenPipeError, ConnectionResetError):  # the server may answer before it has read the body
            connection.request("PUT", f"{url.path.rsplit('/', 1)[0]}/unrequested-{i}", body, headers)
        statuses.append(connection.getresponse().status)
        connection.close()
    return ", ".join(f"{statuses.count(status)} x {status}" for status in sorted(set(statuses)))


def upload_bomb(page: Any, path: Path) -> str:
    """Upload an image that takes much memory to decode, and return the answer."""
    image = page.locator(".attention-overlay img").first.get_attribute("src")
    page.locator("input[type=file]").first.set_input_files(path)
    return wait_for_answer(page, image)


def upload_at_once(pages: list[Any], files: list[Path]) -> str:
    """Upload a file in every session before the first answer, and return the answers."""
    images = [page.locator(".attention-overlay img").first.get_attribute("src") for page in pages]
    for page, path in zip(pages, files, strict=True):
        page.locator("input[type=file]").first.set_input_files(path)
    answers = [wait_for_answer(page, image) for page, image in zip(pages, images, strict=True)]
    return ", ".join(f"{answers.count(answer)} {answer}s" for answer in sorted(set(answers)))


def wait_for_answer(page: Any, image: str | None) -> str:
    """Wait until a page shows another image than before, or an error."""
    error = page.get_by_test_id("stAlert").or_(page.get_by_test_id("stFileUploaderFileErrorMessage"))
    viewer = page.locator(".attention-overlay img")
    deadline = time.monotonic() + TIMEOUT / 1000
    while time.monotonic() < deadline:
        if error.count():
            return "error"
        if viewer.count() and viewer.first.get_attribute("src") != image:
            return "caption"
        time.sleep(0.1)
    return "timeout"


if __name__ == "__main__":
    main()
