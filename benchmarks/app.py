"""Waiting time for a caption in `gridcap app`, in Chromium.

The app serves a ResNet-50 captioner with random weights, so captions have the maximum length. Times include the
browser: from the click on a sample, or the choice of a file, until the page shows the new image with its captions.
"""

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.workloads import (
    decoder_params,
    encode_params,
    make_vocabulary,
    save_random_model,
    save_random_weights,
    write_photographs,
)
from pipeline.features.encoder import load_encoder
from pipeline.features.encoding import encoder_spec

NUM_ROUNDS = 6
IMAGE_SIZE = 224  # px
VOCAB_SIZE = 2500
TIMEOUT = 120_000  # ms
DECODER = decoder_params(embedding_size=256, hidden_size=512, attention_size=256)


def main() -> None:
    """Print a table of waiting times."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        print("app: skipped, Chromium is not installed")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records, source = write_photographs(folder, NUM_ROUNDS)
        files = [folder / record.file for record in records]
        with serve_app(write_model(folder), folder) as (url, _), sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, chromium_sandbox=False)
            page = browser.new_page()
            start = time.perf_counter()
            page.goto(url)
            page.locator(".caption .word").first.wait_for(timeout=TIMEOUT)
            first_time = 1000 * (time.perf_counter() - start)
            samples = page.locator(".samples button").all()[1 : 1 + NUM_ROUNDS]
            sample_times = [wait_for_image(page, sample.click) for sample in samples]
            file_input = page.locator("input[type=file]").first
            upload_times = [wait_for_image(page, partial(file_input.set_input_files, file)) for file in files]
            browser.close()
    print(f"app: ResNet-50 at {IMAGE_SIZE} px, {NUM_ROUNDS} uploads, {source}")
    print(f"{'waiting for':>18} {'median, ms':>11} {'max, ms':>9}")
    for label, times in (("page, 1st caption", [first_time]), ("sample", sample_times), ("upload", upload_times)):
        print(f"{label:>18} {median(times):>11.0f} {max(times):>9.0f}", flush=True)


def write_model(folder: Path) -> Path:
    """Write a model folder with random weights."""
    weights = folder / "resnet50.safetensors"
    save_random_weights("resnet50", weights)
    params = encode_params("resnet50", "layer4", weights, IMAGE_SIZE)
    spec = encoder_spec(load_encoder(params), params)
    return save_random_model(folder / "model", DECODER, spec, make_vocabulary(VOCAB_SIZE), str(weights))


@contextmanager
def serve_app(model: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """Run `gridcap app` on a free port, with `folder` as its working directory.

    Yields:
        The URL of the app, and the id of its process.
    """
    command = [sys.executable, "-W", "ignore", "-c", "from pipeline.cli import main; main()", "app", "--port", "0"]
    with subprocess.Popen([*command, "--model", str(model)], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            match = next(filter(None, (re.search(r"http://\S+:\d+", line) for line in process.stdout)))
            yield match[0], process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)


def wait_for_image(page: Any, choose: Callable[[], object]) -> float:
    """Choose an image and wait until the viewer shows it.

    Args:
        page: A page of the app that shows an image.
        choose: Clicks a sample or chooses a file.

    Returns:
        Milliseconds, as the page measures them.
    """
    page.locator(".attention-overlay img").first.evaluate(
        """(image, timeout) => {
            const before = image.src;
            let start = performance.now();
            for (const type of ["click", "change"]) {
                window.addEventListener(type, () => { start = performance.now(); }, { capture: true, once: true });
            }
            window.waitingTime = new Promise((resolve, reject) => {
                setTimeout(() => reject(new Error("the image does not change")), timeout);
                const observer = new MutationObserver(() => {
                    if (image.src !== before) {
                        observer.disconnect();
                        resolve(performance.now() - start);
                    }
                });
                observer.observe(image, { attributes: true, attributeFilter: ["src"] });
            });
        }""",
        TIMEOUT,
    )
    choose()
    return float(page.evaluate("window.waitingTime"))
