"""Peak memory of the stages `encode` and `generate`, by the number of images: it should not grow with the dataset.

Each run is the stage's own command in a process of its own. `encode` reads small pictures (64 px, ResNet-18 to layer3)
and has an empty work folder; `generate` writes three captions of each image, by a beam of 5 and a decoder of random
weights that seldom ends one. The kernel keeps the highest resident memory (`VmHWM`). The `ru_maxrss` of a process is no
less than the memory of the process that started it, so it will not do here.
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

from benchmarks.workloads import painted, records, save_model, save_weights
from pipeline.captions.records import write_records
from pipeline.decoder.soft_attention import DecoderParams
from pipeline.features.encoder import EncodeParams
from pipeline.features.store import FeatureStore
from pipeline.generation.caption_io import CAPTIONS_FILE
from pipeline.generation.generate import GenerateParams
from pipeline.generation.search import SearchParams
from pipeline.params import to_plain

IMAGES = (1_000, 20_000)
SIZE = 64
VOCABULARY = 1000
SIZES = DecoderParams(
    embedding_size=64, hidden_size=64, attention_size=64, dropout=0.0, region_dropout=0.0, word_dropout=0.0
)

STAGE = """
import atexit, pathlib, re, runpy, sys

def report():
    print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

atexit.register(report)
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""


def peak(stage: str, **flags: Path) -> float:
    """MiB at most while a stage runs."""
    done = subprocess.run(
        [sys.executable, "-c", STAGE, stage, *(f"--{name}={path}" for name, path in flags.items()), "--device=cpu"],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1]) / 1024


def encode(folder: Path, count: int) -> float:
    """MiB at most while the first images of the folder are encoded."""
    run = folder / f"encode-{count}"
    write_records(run / "prepared", records(count))
    metrics = run / "metrics.json"
    highest = peak(
        "stages.encode_images",
        params=folder / "params.yaml",
        prepared=run / "prepared",
        images=folder / "images",
        out=run / "features",
        work=run / "work",
        metrics=metrics,
    )
    assert json.loads(metrics.read_text())["images"] == count
    return highest


def generate(folder: Path, count: int) -> float:
    """MiB at most while so many images are captioned, whose grids `encode` has made."""
    run = folder / f"generate-{count}"
    encoded = folder / f"encode-{count}"
    save_model(run / "model", SIZES, FeatureStore(encoded / "features").spec, VOCABULARY)
    highest = peak(
        "stages.generate_captions",
        params=folder / "params.yaml",
        prepared=encoded / "prepared",
        features=encoded / "features",
        model=run / "model",
        out=run / "generated",
    )
    assert len(json.loads((run / "generated" / CAPTIONS_FILE).read_text())) == count
    return highest


def main(counts: Sequence[int] = IMAGES) -> None:
    """Print seconds and peak memory for each number of images, and what a thousand more images take."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "resnet18.safetensors"
        save_weights("resnet18", weights)
        params = EncodeParams(
            architecture="resnet18",
            layer="layer3",
            weights=str(weights),
            image_size=SIZE,
            precision="float32",
            compile=False,
            views=("whole",),
        )
        search = replace(SearchParams.greedy(max_length=20), beam_size=5, n_best=3)
        (folder / "others").mkdir(exist_ok=True)
        found = GenerateParams(split="train", ensemble=folder / "others", search=search)
        (folder / "params.yaml").write_text(json.dumps({"encode": to_plain(params), "generate": to_plain(found)}))
        (folder / "images").mkdir()
        for number in range(max(counts)):
            (folder / "images" / f"{number}.jpg").write_bytes(painted(number, SIZE, SIZE))
        print(f"memory of encoding images of {SIZE} px and of captioning them, on the CPU, {os.cpu_count()} threads")
        print(f"{'':>8} {'images':>10} {'seconds':>9} {'peak, MiB':>10}   MiB for a thousand more")
        for stage in (encode, generate):
            lowest: tuple[int, float] | None = None
            for count in sorted(counts):
                began = time.perf_counter()
                highest = stage(folder, count)
                line = f"{stage.__name__:>8} {count:>10} {time.perf_counter() - began:>9.1f} {highest:>10.1f}"
                if lowest is None:
                    lowest = count, highest
                else:
                    line += f"   {(highest - lowest[1]) / (count - lowest[0]) * 1000:>23.2f}"
                print(line, flush=True)
