"""What a GPU is good for: encoding, training, searching, the whole pipeline, and resuming after `kill -9`.

    bash benchmarks/gpu.sh            # the tests marked `gpu`, then this, in less than 8 minutes on an H100
    python -m benchmarks.gpu          # this alone, on GRIDCAP_DEVICE or the first GPU
    python -m benchmarks.gpu --smoke  # the same code with small sizes, on any device
    python -m benchmarks.gpu train search   # some of its sections

The tables of `encoding`, `training` and `searching` are those of `python -m benchmarks`, with the targets for a GPU:
90% of the time busy, training at least 15 times and search at least 50 times as fast as the textbook. `pipeline` is a
`dvc repro` of the scenes in a copy of the project without git, with the seconds of every stage. `resume` trains again,
is killed after its first checkpoint, resumes, and must end with the bytes of the pipeline's model; it needs `pipeline`.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from ruamel.yaml import YAML

import stages  # noqa: F401  # sets GOMP_SPINCOUNT before PyTorch is imported
from benchmarks import encoding, one_of, searching, training
from benchmarks.processor import describe_device
from pipeline.device import setup_device
from pipeline.presets import use

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", ".gpu", ".*_cache", "__pycache__", ".work", "shared", "rendered", "tmp", "cache", "results"),
    "*.lock",
)
TRAIN_TARGET, SEARCH_TARGET = 15.0, 50.0
NUM_IMAGES, ROUNDS = 1024, 3
SMOKE_SIDE, SMOKE_CHANNELS, SMOKE_WORDS = 3, 16, 50

SECTIONS = ("encode", "train", "search", "pipeline", "resume")
Section = Callable[[], Iterator[str]]


def encode(smoke: bool) -> Iterator[str]:
    """Print the table of `encoding`."""
    if smoke:
        encoding.main(num_images=4, num_rounds=1, encoders=[("resnet18", "layer2")], modes=encoding.MODES[:2])
    else:
        encoding.main(NUM_IMAGES, ROUNDS, encoders=encoding.ENCODERS[:1])
    yield from ()


def train(smoke: bool) -> Iterator[str]:
    """Yield the lines of `training`."""
    device = setup_device(os.environ.get("GRIDCAP_DEVICE", "auto"))
    yield f"training on {describe_device(device)}; textbook: {training.REFERENCE}"
    if smoke:
        case = training.Case(SMOKE_SIDE, SMOKE_CHANNELS, SMOKE_WORDS, TRAIN_TARGET, TRAIN_TARGET)
        yield from training.compare("soft_attention", case, device, 1, [training.MODES[0], training.MODES[2]])
        return
    for case in training.CASES:
        case = case._replace(float32_target=TRAIN_TARGET, best_target=TRAIN_TARGET)
        yield from training.compare("soft_attention", case, device, ROUNDS)


def search(smoke: bool) -> Iterator[str]:
    """Yield the lines of `searching`."""
    device = setup_device(os.environ.get("GRIDCAP_DEVICE", "auto"))
    yield f"searching on {describe_device(device)}; beam size {searching.BEAM_SIZE}"
    cases = [searching.Case(SMOKE_SIDE, SMOKE_CHANNELS, SMOKE_WORDS)] if smoke else searching.CASES
    for case in cases:
        yield from searching.compare(case, device, 1 if smoke else ROUNDS, SEARCH_TARGET)


def run_pipeline(project: Path, smoke: bool) -> Iterator[str]:
    """Run `dvc repro` of the scenes in a new copy of the project, and yield the seconds of its stages."""
    shutil.copytree(ROOT, project, ignore=LEFT_OUT)
    use(ROOT / "presets" / "scenes.yaml", [], project / "params.yaml")
    if smoke:
        edit(project / "data/scenes/params.yaml", render={"num_train": 24, "num_val": 6, "num_test": 9})
        edit(project / "params.yaml", train={"max_epochs": 3}, evaluate={"attention_plots": 1})
    edit(project / "params.yaml", evaluate={"meteor": False})  # needs Java
    (project / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    start = last = time.monotonic()
    log, stage = "", ""
    with subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log += line
            if line.startswith("Running stage"):
                if stage:
                    yield f"{stage:>24} {time.monotonic() - last:>8.1f} s"
                stage, last = line.split("'")[1].split(":")[-1], time.monotonic()
    if process.returncode != 0:
        raise SystemExit(f"{log}\ndvc repro failed")
    yield f"{stage:>24} {time.monotonic() - last:>8.1f} s"
    yield f"{'dvc repro':>24} {time.monotonic() - start:>8.1f} s"


def edit(file: Path, **sections: dict[str, object]) -> None:
    """Change values in the sections of a YAML file."""
    yaml = YAML()
    document = yaml.load(file)
    for section, values in sections.items():
        document[section].update(values)
    yaml.dump(document, file)


def resume(project: Path) -> Iterator[str]:
    """Train the pipeline's model again, kill it once, and compare the bytes."""
    out, work = project / "data" / "resumed", project / "data" / "resumed_work"
    paths = {"params": "params.yaml", "tokens": "data/tokens", "features": "data/features"}
    paths |= {"out": str(out), "work": str(work), "live": str(work / "live")}
    command = [sys.executable, "-m", "stages.train_decoder", *(f"--{name}={path}" for name, path in paths.items())]

    def start(*flags: str) -> subprocess.Popen[bytes]:
        with work.with_suffix(".log").open("a") as log:
            return subprocess.Popen([*command, *flags], cwd=project, stdout=log, stderr=log)

    with start("--checkpoint-seconds=0") as process:
        while process.poll() is None and not glob("train/*/checkpoint.safetensors", root_dir=work):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    with start() as process:
        process.wait()
    log = work.with_suffix(".log").read_text()
    if process.returncode != 0 or "resuming from" not in log:
        raise SystemExit(f"{log}\ntraining did not resume")
    trained = {path.name: path.read_bytes() for path in sorted((project / "data" / "trained").iterdir())}
    resumed = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
    different = sorted(name for name in trained.keys() | resumed.keys() if trained.get(name) != resumed.get(name))
    if different:
        raise SystemExit(f"resumed to other bytes than those of the uninterrupted run: {', '.join(different)}")
    yield f"{'resume after kill -9':>24} {len(trained)} files with the same bytes"


def main() -> None:
    """Run all sections, and print the seconds of each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sections",
        nargs="*",
        type=one_of(SECTIONS),
        metavar="SECTION",
        help=f"one of {', '.join(SECTIONS)} (default: all)",
    )
    parser.add_argument("--smoke", action="store_true", help="use small sizes, to test this program on any device")
    arguments = parser.parse_args()
    smoke, selected = arguments.smoke, arguments.sections or SECTIONS
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        sections: dict[str, Section] = {
            "encode": lambda: encode(smoke),
            "train": lambda: train(smoke),
            "search": lambda: search(smoke),
            "pipeline": lambda: run_pipeline(project, smoke),
            "resume": lambda: resume(project),
        }
        for name in selected:
            if name in ("pipeline", "resume") and not all(map(find_spec, ("dvc", "spacy"))):
                print(f"== {name}: skipped, as DVC or spaCy is missing. benchmarks/gpu.sh explains how to bring it.")
                continue
            start = time.monotonic()
            print(f"== {name}", flush=True)
            for line in sections[name]():
                print(line, flush=True)
            print(f"== {name}: {time.monotonic() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
