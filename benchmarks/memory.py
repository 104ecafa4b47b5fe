"""Peak memory of the stages `encode` and `generate` by number of images. It should not grow with the dataset.

Each run is the command of a stage in a separate process. `encode` reads small images (64 px, ResNet-18 up to layer3)
with an empty work folder. `generate` writes three captions per image, with beam size 5 and a random decoder whose
captions rarely end early. The kernel records the peak resident memory of a process as `VmHWM`; `ru_maxrss` is at least
the memory of the parent process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.workloads import (
    decoder_params,
    encode_params,
    make_records,
    make_vocabulary,
    random_jpeg,
    save_random_model,
    save_random_weights,
)
from pipeline.artifacts import read_json
from pipeline.captions.records import write_records
from pipeline.features.store import FeatureStore
from pipeline.generation.caption_io import CAPTIONS_FILE
from pipeline.generation.generate import GenerateParams
from pipeline.generation.search import SearchParams
from pipeline.params import to_plain

SIZE, NUM_DISTINCT = 64, 80
REMEDY = "Run the benchmark again."
VOCAB_SIZE = 1000
DECODER = decoder_params(embedding_size=64, hidden_size=64, attention_size=64)

# Runs a stage and prints its peak memory in KiB as the last line.
RUN_STAGE = """
import atexit, pathlib, re, runpy, sys

def report():
    print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

atexit.register(report)
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


def peak_memory(stage: str, **flags: Path) -> float:
    """Run a stage and return its peak memory in MiB."""
    process = subprocess.run(
        [sys.executable, "-c", RUN_STAGE, stage, *(f"--{name}={path}" for name, path in flags.items()), "--device=cpu"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"{stage} failed:\n{process.stderr}")
    return int(process.stdout.split()[-1]) / 1024


def encode(folder: Path, num_images: int) -> float:
    """Encode the first images of the folder and return the peak memory in MiB."""
    run = folder / f"encode-{num_images}"
    write_records(run / "prepared", make_records(num_images))
    metrics = run / "metrics.json"
    memory = peak_memory(
        "stages.encode_images",
        params=folder / "params.yaml",
        prepared=run / "prepared",
        out=run / "features",
        work=run / "work",
        metrics=metrics,
    )
    assert read_json(metrics, dict[str, int], REMEDY)["num_images"] == num_images
    return memory


def generate(folder: Path, num_images: int) -> float:
    """Caption the images that `encode` encoded and return the peak memory in MiB."""
    run = folder / f"generate-{num_images}"
    encoded = folder / f"encode-{num_images}"
    save_random_model(run / "model", DECODER, FeatureStore(encoded / "features").spec, make_vocabulary(VOCAB_SIZE))
    memory = peak_memory(
        "stages.generate_captions",
        params=folder / "params.yaml",
        prepared=encoded / "prepared",
        features=encoded / "features",
        trained=run / "model",
        model=run / "model",
        out=run / "generated",
    )
    assert len(read_json(run / "generated" / CAPTIONS_FILE, list[Any], REMEDY)) == num_images
    return memory


def write_params(folder: Path) -> None:
    """Write the encoder's weights and the params file of both stages."""
    weights = folder / "resnet18.safetensors"
    save_random_weights("resnet18", weights)
    search = replace(SearchParams.greedy(max_length=20), beam_size=5, n_best=3)
    (folder / "ensemble").mkdir(exist_ok=True)
    generate_params = GenerateParams(split="train", ensemble=folder / "ensemble", search=search)
    params = {
        "dataset": {"root": str(folder), "images": "images", "bad_images": "error"},
        "encode": to_plain(encode_params("resnet18", "layer3", weights, SIZE)),
        "generate": to_plain(generate_params),
    }
    (folder / "params.yaml").write_text(json.dumps(params))


def main(image_counts: Sequence[int]) -> None:
    """Print seconds and peak memory for each number of images, and the growth per 1,000 images."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_params(folder)
        (folder / "images").mkdir()
        images = [random_jpeg(seed, SIZE, SIZE) for seed in range(NUM_DISTINCT)]
        for i in range(max(image_counts)):
            # Different bytes after the end of the image: the stage encodes equal files only once.
            (folder / "images" / f"{i}.jpg").write_bytes(images[i % NUM_DISTINCT] + i.to_bytes(8))
        print(f"memory of encoding and captioning images of {SIZE} px on the CPU, {os.cpu_count()} threads")
        print(f"{'stage':>8} {'images':>10} {'seconds':>9} {'peak, MiB':>10} {'MiB per 1,000 images':>22}")
        for stage in (encode, generate):
            smallest: tuple[int, float] | None = None
            for num_images in sorted(image_counts):
                start = time.perf_counter()
                memory = stage(folder, num_images)
                line = f"{stage.__name__:>8} {num_images:>10} {time.perf_counter() - start:>9.1f} {memory:>10.1f}"
                if smallest is None:
                    smallest = num_images, memory
                else:
                    line += f" {(memory - smallest[1]) / (num_images - smallest[0]) * 1000:>22.2f}"
                print(line, flush=True)
