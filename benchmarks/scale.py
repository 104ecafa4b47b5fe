"""Time and peak memory of every stage on a dataset of COCO's size, run by `dvc repro` in a clone of this repository.

The dataset has the form of COCO 2017: small JPEGs made from photographs of COCO, and captions recombined from real
ones. 10,000 of its 123,287 images are not in the train split, and 5,000 of them are captioned and scored. The dataset
and the clone stay in `--folder`; a later run uses the dataset again. The clone has the committed code.

Of each stage the table shows the seconds, the processor seconds and the peak resident memory, and the seconds and
processor seconds that `dvc repro` adds. `train` is stopped after its first optimizer step; its seconds end with this
step. The stages after it use a decoder with random weights. `nothing` is a `dvc repro` of the whole pipeline when all
is up to date; if it runs a stage, the benchmark fails.

With `--random-grids`, `encode` does not run, and a store of grids of 7 x 7 x 2048 is written instead: 25 GB for COCO.

`--kills N` runs `encode` once more, with an empty work folder, kills it N times at random moments, and compares index
and shards with those of the uninterrupted run. Each start has a row: the seconds until it has found the shards that are
there, their number, and the seconds until it was killed or ended.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.reading import SPEC
from benchmarks.workloads import PHOTOGRAPHS, decoder_params, random_jpeg, save_random_model, save_random_weights
from pipeline.artifacts import file_digest, read_json, write_json
from pipeline.captions.records import iter_records
from pipeline.captions.vocabulary import VOCABULARY_FILE, read_vocabulary
from pipeline.decoder.model_io import write_history
from pipeline.features.encoding import ROWS_PER_SHARD
from pipeline.features.near_duplicates import write_near_duplicates
from pipeline.features.store import FeatureStore, Shard, write_index, write_shard
from pipeline.presets import use

ROOT = Path(__file__).parents[1]
NUM_IMAGES, NUM_EVALUATED, CAPTIONS_PER_IMAGE = 123_287, 10_000, 5
IMAGE_SIZE = 112
STAGES = ("prepare", "tokenize", "encode", "train", "generate", "evaluate", "nothing")
CAPTION_FILES = ("coco/captions_train2017_sample.json", "text/captions_val2017_part.json")
DECODER = decoder_params(embedding_size=512, hidden_size=512, attention_size=512, dropout=0.5)
REMEDY = "Delete the folder and run the benchmark again."

# Runs Python and appends the times and the peak memory of the process to the file $USAGE. It is the `python` of the
# stages. It imports little, since the peak memory of a process is at least that of the process that starts it.
RUN_MEASURED = """\
import json, os, signal, sys, time
start = time.time()
# A shell starts background jobs with SIGINT ignored, and `train` must be stopped by it.
process = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ, setsigdef=[signal.SIGINT])
signal.signal(signal.SIGINT, signal.SIG_IGN)
_, status, usage = os.wait4(process, 0)
line = {
    "command": sys.argv[1:], "start": start, "seconds": time.time() - start,
    "cpu_seconds": usage.ru_utime + usage.ru_stime, "mebibytes": usage.ru_maxrss / 1024,
}
with open(os.environ["USAGE"], "a") as file:
    file.write(json.dumps(line) + "\\n")
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Times and peak memory of a process."""

    command: list[str]
    start: float
    """Seconds since 1970."""
    seconds: float
    cpu_seconds: float
    mebibytes: float


class Clone:
    """A clone of this repository, whose `dvc repro` is measured."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
        self.folder = folder
        weights = dataset / "resnet18.safetensors"
        encoder = {"architecture": "resnet18", "layer": "layer3", "weights": weights, "image_size": IMAGE_SIZE}
        if not weights.is_file():
            save_random_weights("resnet18", weights)
        settings = [f"dataset.root={dataset / 'coco'}", "evaluate.meteor=false"]
        settings += [f"encode.{name}={value}" for name, value in encoder.items()]
        use(ROOT / "presets" / "coco.yaml", settings, folder / "params.yaml")
        self._programs = folder / ".git" / "measured"
        self._programs.mkdir()
        (self._programs / "run.py").write_text(RUN_MEASURED)
        python = self._programs / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {self._programs / "run.py"} "$@"\n')
        python.chmod(0o755)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start a DVC command in a session of its own."""
        (self._programs / "usage.jsonl").write_text("")
        environment = os.environ | {
            "PATH": f"{self._programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder),
            "USAGE": str(self._programs / "usage.jsonl"),
        }
        return subprocess.Popen(
            [self._programs / "python", "-m", "dvc", *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def usage(self) -> list[Usage]:
        """Return the usage of the stages of the last command, then that of the command."""
        lines = (self._programs / "usage.jsonl").read_text().splitlines()
        return [Usage(**json.loads(line)) for line in lines]

    def run(self, *arguments: str) -> list[Usage]:
        """Run a DVC command to its end and return `usage`."""
        process = self.start(*arguments)
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"dvc {' '.join(arguments)} failed:\n{output}")
        return self.usage()

    def run_killed(self, num_kills: int) -> Iterator[tuple[float, int, float]]:
        """Encode with an empty work folder and N kills, and compare the store with that of the uninterrupted run.

        Yields:
            For each start, the seconds until it has found the shards of earlier starts, their number, and the seconds
            that it ran.
        """
        data, scratch = self.folder / "data", self.folder / "killed"
        shutil.rmtree(scratch, ignore_errors=True)
        work, out = scratch / "work", scratch / "features"
        paths = {"params": self.folder / "params.yaml", "prepared": data / "prepared", "out": out, "work": work}
        flags = [f"--{name}={path}" for name, path in (paths | {"metrics": scratch / "metrics.json"}).items()]
        num_shards = len(list((data / "features").glob("*.h5")))
        rng = random.Random(0)
        # Each start but the last is killed up to two seconds after it has written some more shards.
        for last_shard in [*sorted(rng.sample(range(1, num_shards), num_kills)), None]:
            start, num_found = time.monotonic(), count_shards(work)
            process = subprocess.Popen(
                [sys.executable, "-m", "stages.encode_images", *flags],
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": str(self.folder)},
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            assert process.stderr is not None
            for line in process.stderr:
                if "images are already encoded" in line:
                    break
            seconds_to_find = time.monotonic() - start
            if last_shard is not None:
                while process.poll() is None and count_shards(work) < last_shard:
                    time.sleep(0.1)
                time.sleep(2 * rng.random())
                with suppress(ProcessLookupError):  # it has ended
                    os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if process.returncode not in (0, -signal.SIGKILL):
                raise RuntimeError(f"encode failed with exit status {process.returncode}")
            yield seconds_to_find, num_found, time.monotonic() - start
        uninterrupted, killed = (
            {path.name: file_digest(path) for path in folder.iterdir()} for folder in (data / "features", out)
        )
        if killed != uninterrupted:
            raise RuntimeError(f"{out}: differs from the store of the uninterrupted run")
        shutil.rmtree(scratch)

    def run_first_step(self) -> list[Usage]:
        """Run `train` until its first optimizer step, whose end is the end of the stage in `usage`."""
        process = self.start("repro", "--single-item", "train")
        steps = self.folder / "results" / "live" / "plots" / "metrics" / "train" / "loss.tsv"
        while not steps.is_file():
            if process.poll() is not None:
                raise RuntimeError(f"train failed:\n{process.communicate()[0]}")
            time.sleep(0.05)
        first_step = steps.stat().st_mtime
        os.killpg(process.pid, signal.SIGINT)
        process.communicate()
        stage, dvc = self.usage()
        return [Usage(**vars(stage) | {"seconds": first_step - stage.start}), dvc]


def count_shards(work: Path) -> int:
    """Count the finished shards in a work folder of `encode`."""
    return len(glob("encode/*/shard-*.sha256", root_dir=work))


def read_captions(real: Path) -> list[list[str]]:
    """Read real captions as lists of words; without them, the words are random."""
    files = [real / name for name in CAPTION_FILES if (real / name).is_file()]
    captions = [
        annotation["caption"].split()
        for file in files
        for annotation in read_json(file, dict[str, Any], REMEDY)["annotations"]
    ]
    rng = random.Random(0)
    return captions or [[f"word{int(rng.paretovariate(0.5)) % 9999}" for _ in range(10)] for _ in range(20_000)]


def read_images() -> list[bytes]:
    """Make a small JPEG of each photograph of COCO, or of random images."""
    files = [path.read_bytes() for path in sorted(PHOTOGRAPHS.glob("*.jpg"))]
    images = []
    for content in files or [random_jpeg(seed, 640, 480) for seed in range(80)]:
        file = BytesIO()
        Image.open(BytesIO(content)).convert("RGB").resize((160, 120)).save(file, "JPEG", quality=80)
        images.append(file.getvalue())
    return images


def write_dataset(root: Path, num_images: int) -> None:
    """Write `train2017`, `val2017` and `annotations`. Each image file has different bytes after its end."""
    rng = random.Random(0)
    captions, images = read_captions(PHOTOGRAPHS.parents[1]), read_images()
    num_val = round(num_images * NUM_EVALUATED / NUM_IMAGES)
    image_ids = rng.sample(range(1, 5 * num_images), num_images)
    annotation_ids = iter(range(10 * num_images))
    (root / "annotations").mkdir(parents=True)
    for split, split_ids in (("val2017", image_ids[:num_val]), ("train2017", image_ids[num_val:])):
        (root / split).mkdir()
        for image_id in split_ids:
            (root / split / f"{image_id:012}.jpg").write_bytes(rng.choice(images) + image_id.to_bytes(8))
        annotations = [
            {"image_id": image_id, "id": next(annotation_ids), "caption": recombine(rng, captions)}
            for image_id in split_ids
            for _ in range(CAPTIONS_PER_IMAGE)
        ]
        rng.shuffle(annotations)
        rows = [
            {"file_name": f"{image_id:012}.jpg", "height": 120, "width": 160, "id": image_id} for image_id in split_ids
        ]
        document = {"info": {}, "licenses": [], "images": rows, "annotations": annotations}
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(document))


def recombine(rng: random.Random, captions: Sequence[Sequence[str]]) -> str:
    """Join the first half of a caption to the second half of another."""
    first, second = rng.choice(captions), rng.choice(captions)
    return " ".join([*first[: len(first) // 2], *second[len(second) // 2 :]])


def write_random_store(folder: Path, image_ids: Sequence[int]) -> None:
    """Write a store of random grids as large as those of a ResNet-101 at 224 px."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    shards: list[Shard] = []
    for start in range(0, len(image_ids), ROWS_PER_SHARD):
        ids = image_ids[start : start + ROWS_PER_SHARD]
        # Values differ from shard to shard; new random numbers for each would take longer than to write them.
        grids = np.full((len(ids), *SPEC.grid_shape), len(shards) / 1024, dtype=np.float16)
        grids[:, 0] = rng.random(SPEC.channels)
        shards.append(write_shard(folder, SPEC, ids, [(f"{image_id:064}", "whole") for image_id in ids], grids))
        shards[-1].path.with_suffix(".sha256").unlink()
    write_index(folder, SPEC, ["whole"], shards, {image_id: f"{image_id:064}" for image_id in image_ids})
    write_near_duplicates(folder, ())


def write_model(folder: Path, clone: Path, weights: Path) -> None:
    """Write a random decoder of the vocabulary in the clone."""
    vocabulary = read_vocabulary(clone / "data" / "tokens" / VOCABULARY_FILE)
    spec = FeatureStore(clone / "data" / "features").spec
    save_random_model(folder, DECODER, spec, vocabulary, str(weights))
    write_history(
        folder,
        [{"epoch": 1, "train_loss": 9.0, "val_loss": 9.0, "val_accuracy": 0.0, "val_bleu4": 0.0, "val_cider": 0.0}],
    )


def measure(
    clone: Clone, dataset: Path, stages: Sequence[str], random_grids: bool
) -> Iterator[tuple[str, list[Usage]]]:
    """Run the stages in order and yield the usage of each."""
    data = clone.folder / "data"
    for stage in stages:
        if stage == "encode" and random_grids:
            write_random_store(data / "features", [record.image_id for record in iter_records(data / "prepared")])
            write_json(clone.folder / "results" / "metrics" / "encode.json", {})
        elif stage == "train":
            yield stage, clone.run_first_step()
        elif stage == "nothing":
            clone.run("commit", "--force", "encode", "train", "refine")
            *ran, dvc = clone.run("repro")
            if ran:
                modules = ", ".join(process.command[1] for process in ran)
                raise RuntimeError(f"all stages must be up to date, but `dvc repro` ran {modules}")
            yield stage, [dvc]
        else:
            if stage == "generate":
                for name in ("trained", "model"):
                    write_model(data / name, clone.folder, dataset / "resnet18.safetensors")
            yield stage, clone.run("repro", "--single-item", stage)


def print_row(stage: str, num_images: int, usage: Sequence[Usage]) -> None:
    """Print a row of the table."""
    *stages, dvc = usage
    seconds = sum(process.seconds for process in stages)
    cpu_seconds = sum(process.cpu_seconds for process in stages)
    peak = max((process.mebibytes for process in stages), default=dvc.mebibytes)
    print(
        f"{stage:>9} {num_images:>9,} {seconds:>9.1f} {cpu_seconds:>9.1f} {peak:>10.0f}"
        f" {dvc.seconds - seconds:>9.1f} {dvc.cpu_seconds - cpu_seconds:>9.1f}",
        flush=True,
    )


def main(arguments: Sequence[str]) -> None:
    """Parse the arguments and print a row for each number of images and stage."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=NUM_IMAGES, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--tenth", action="store_true", help="run the stages on a tenth of the images first")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="stages to run (default: all)")
    parser.add_argument("--random-grids", action="store_true", help="write random grids instead of running encode")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kills of another run of encode")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "gridcap-scale",
        help="folder of datasets and clones (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    stages = [stage for stage in STAGES if stage in options.stages]
    sizes = [options.num_images // 10] * options.tenth + [options.num_images]
    print(f"{'':>19} {'stage':>30} {'DVC':>19}")
    print(f"{'':>9} {'images':>9} {'seconds':>9} {'CPU s':>9} {'peak, MiB':>10} {'seconds':>9} {'CPU s':>9}")
    for num_images in sizes:
        dataset = options.folder / f"dataset-{num_images}"
        if not dataset.is_dir():
            partial = options.folder / f".dataset-{num_images}"
            shutil.rmtree(partial, ignore_errors=True)
            write_dataset(partial / "coco", num_images)
            partial.rename(dataset)
        clone = Clone(options.folder / f"clone-{num_images}", dataset)
        for stage, usage in measure(clone, dataset, stages, options.random_grids):
            print_row(stage, num_images, usage)
        if options.kills:
            print(f"{'':>9} {'images':>9} {'found in':>9} {'shards':>9} {'ran for':>10}, seconds")
            for seconds_to_find, num_found, seconds in clone.run_killed(options.kills):
                print(
                    f"{'start':>9} {num_images:>9,} {seconds_to_find:>9.1f} {num_found:>9,} {seconds:>10.1f}",
                    flush=True,
                )
            print("the store has the bytes of the uninterrupted run")
