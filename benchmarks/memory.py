"""Peak memory of the stage `encode`, by the number of images: it should not grow with the dataset.

Each run is the stage's own command in a process of its own, over small pictures (64 px, to ResNet-18's layer3), with an
empty work folder. The kernel keeps the highest resident memory (`VmHWM`). The `ru_maxrss` of a process is no less than
the memory of the process that started it, so it will not do here.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.materials import painted, records, save_weights
from pipeline.captions.records import write_records
from pipeline.features.encoder import EncodeParams

IMAGES = (1_000, 20_000)
SIZE = 64

STAGE = """
import atexit, pathlib, re, runpy

def report():
    print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

atexit.register(report)
runpy.run_module("stages.encode_images", run_name="__main__")
"""


def peak(folder: Path, count: int) -> float:
    """MiB at most while the first images of the folder are encoded."""
    run = folder / f"run-{count}"
    write_records(run / "prepared", records(count))
    places = {
        "params": folder / "params.yaml",
        "prepared": run / "prepared",
        "images": folder / "images",
        "out": run / "features",
        "work": run / "work",
        "metrics": run / "metrics.json",
    }
    flags = [f"--{name}={path}" for name, path in places.items()]
    done = subprocess.run(
        [sys.executable, "-c", STAGE, *flags, "--device=cpu"],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert json.loads(places["metrics"].read_text())["images"] == count
    return int(done.stdout.split()[-1]) / 1024


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
            watch=str(weights),
            image_size=SIZE,
            precision="float32",
            compile=False,
            views=("whole",),
        )
        (folder / "params.yaml").write_text(json.dumps({"encode": asdict(params)}))
        (folder / "images").mkdir()
        for number in range(max(counts)):
            (folder / "images" / f"{number}.jpg").write_bytes(painted(number, SIZE, SIZE))
        print(f"memory of encoding images of {SIZE} px, ResNet-18 to layer3, on the CPU, {os.cpu_count()} threads")
        print(f"{'images':>10} {'seconds':>9} {'peak, MiB':>10}   MiB for a thousand more")
        lowest: tuple[int, float] | None = None
        for count in sorted(counts):
            began = time.perf_counter()
            highest = peak(folder, count)
            line = f"{count:>10} {time.perf_counter() - began:>9.1f} {highest:>10.1f}"
            if lowest is None:
                lowest = count, highest
            else:
                line += f"   {(highest - lowest[1]) / (count - lowest[0]) * 1000:>23.2f}"
            print(line, flush=True)
