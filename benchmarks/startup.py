"""Start of every command, in processor seconds of all its threads and in seconds: the least of several rounds.

The model has random weights, sizes as in params.yaml and the encoder of the embedded dataset. `dvc repro` is measured
in the working directory if all stages are up to date there.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from urllib.request import urlopen

from PIL import Image

from benchmarks.app import serve_app
from benchmarks.workloads import decoder_params, encode_params, make_vocabulary, save_random_model
from pipeline import cli
from pipeline.features.encoder import load_encoder
from pipeline.features.encoding import encoder_spec
from pipeline.import_graph import ROOT, modules

ROUNDS = 5
IMAGE_SIZE = 128  # px
VOCAB_SIZE = 100
ENCODER_WEIGHTS = ROOT / "data" / "scenes" / "encoder.safetensors"
DECODER = decoder_params(embedding_size=128, hidden_size=256, attention_size=128)
GRIDCAP = [sys.executable, "-c", "from pipeline.console import main; main()"]

Times = tuple[float, float]
"""Processor seconds and seconds."""


def main(rounds: int = ROUNDS) -> None:
    """Print a table with a row for each kind of start."""
    commands = [
        command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback
    ]
    stages = [name for name in modules() if name.startswith("stages.")]
    print(f"startup, least of {rounds} rounds")
    print(f"{'':>32} {'processor s':>12} {'s':>6}  goal")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, image = write_model(folder), folder / "image.png"
        Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "gray").save(image)
        predict = [*GRIDCAP, "predict", str(image), "--model", str(model)]
        print_row("gridcap predict IMAGE", least(partial(run, predict), rounds), "3 processor s")
        for label, starts in (
            ("gridcap COMMAND --help", [[*GRIDCAP, name, "--help"] for name in commands]),
            ("python -m stages.NAME --help", [[sys.executable, "-m", name, "--help"] for name in stages]),
        ):
            slowest = max(least(partial(run, start), rounds) for start in starts)
            print_row(f"{label}, slowest", slowest, "0.5 processor s")
        print_row("gridcap app, first page", least(partial(first_page, model, folder), rounds), "3 s")
    repro = ["dvc", "repro"]
    if "up to date" in subprocess.run([*repro, "--dry"], capture_output=True, text=True, check=False).stdout:
        print_row("dvc repro, nothing to do", least(partial(run, repro), rounds), "2.5 processor s")
    else:
        print("dvc repro, nothing to do: skipped, stages are out of date here")


def print_row(label: str, times: Times, goal: str) -> None:
    """Print a row of the table."""
    print(f"{label:>32} {times[0]:>12.2f} {times[1]:>6.2f}  {goal}", flush=True)


def least(measure: Callable[[], Times], rounds: int) -> Times:
    """Return the least of each time over several rounds."""
    processor_seconds, seconds = zip(*(measure() for _ in range(rounds)), strict=True)
    return min(processor_seconds), min(seconds)


def run(command: Sequence[str]) -> Times:
    """Run a command to its end."""
    start, processor_start = time.perf_counter(), children_seconds()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return children_seconds() - processor_start, time.perf_counter() - start


def first_page(model: Path, folder: Path) -> Times:
    """Start the app, load its first page, and end it."""
    start, processor_start = time.perf_counter(), children_seconds()
    with serve_app(model, folder) as (url, _):
        with urlopen(url) as page:
            page.read()
        seconds = time.perf_counter() - start
    return children_seconds() - processor_start, seconds


def children_seconds() -> float:
    """Return the processor seconds of all processes that this one has started and that have ended."""
    usage = getrusage(RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def write_model(folder: Path) -> Path:
    """Write a model folder with random weights."""
    params = encode_params("resnet18", "layer3", ENCODER_WEIGHTS, IMAGE_SIZE)
    spec = encoder_spec(load_encoder(params), params)
    return save_random_model(folder / "model", DECODER, spec, make_vocabulary(VOCAB_SIZE), str(ENCODER_WEIGHTS))
