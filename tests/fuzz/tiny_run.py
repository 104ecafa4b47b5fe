"""A run of the whole pipeline on a few images, and a server that runs commands on it, each in a process of its own.

The server imports the slow modules once, and forks for each command. It is single-threaded, so that it can.
"""

import gc
import gzip
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from pipeline import cli, errors
from pipeline.params import load, read_yaml
from pipeline.presets import use
from pipeline.training.train import run_fingerprint
from pipeline.training.trainer import TrainParams
from tests.dataset_files import write_coco
from tests.factories import random_encoder
from tests.paths import ROOT
from tests.tiny_dataset import make_trainer, paths_of, take_steps

TIMEOUT = 60
"""Seconds after which a command counts as hung. Idle, the slowest takes 3."""
_MEMORY = 16 << 30
"""Bytes of address space of a command."""

NUM_IMAGES = 12
_DATASET = """\
# A dataset of solid colors
dataset:
  format: coco
  root: photos
  images: images
  captions:
    - {file: coco.json, folder: ".", split: null}
  splits: {by: lists, train: train.txt, val: val.txt, test: test.txt}
  missing_images: error
  bad_captions: error
  bad_images: error
"""
_SETTINGS = """
tokenize.min_count=1
encode.layer=layer2 encode.image_size=32 encode.weights=weights.safetensors
train.decoder.embedding_size=8 train.decoder.hidden_size=8 train.decoder.attention_size=8
train.text=text.csv train.batch_size=4 train.max_epochs=2 train.max_length=8
generate.search.beam_size=2 generate.search.n_best=2 generate.search.min_length=3 generate.search.max_length=8
evaluate.meteor=false evaluate.bootstrap_samples=100 evaluate.attention_plots=1
"""


def stage_commands() -> dict[str, str]:
    """Return the command line of each stage, as in dvc.yaml."""
    document = read_yaml(ROOT / "dvc.yaml")
    variables = {name: path for variables in document["vars"] for name, path in variables.items()}
    return {stage: Template(fields["cmd"]).substitute(variables) for stage, fields in document["stages"].items()}


def write_inputs(folder: Path) -> None:
    """Write a dataset in every format, params, a preset, weights, a text and captions to score."""
    photos = folder / "photos"
    for new in (photos / "images", folder / "data" / "ensemble"):
        new.mkdir(parents=True)
    rng = np.random.default_rng(0)
    colors = ["red", "green", "blue"] * (NUM_IMAGES // 3)
    names = [f"{index}_{color}.{['png', 'jpg'][index % 2]}" for index, color in enumerate(colors)]
    captions = [[f"a {color} wall", f"The wall is {color}."] for color in colors]
    pairs = [(index, caption) for index, texts in enumerate(captions) for caption in texts]
    for name, color in zip(names, colors, strict=True):
        pixels = np.array(Image.new("RGB", (40, 30), color)) ^ rng.integers(0, 16, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(photos / "images" / name)
    for split, part in {"train": names[:6], "val": names[6:9], "test": names[9:]}.items():
        (photos / f"{split}.txt").write_text("\n".join(part) + "\n")
    write_coco(photos / "coco", [{"id": index, "file_name": name} for index, name in enumerate(names)], pairs)
    (photos / "flickr8k").write_text("image,caption\n" + "".join(f"{names[index]},{text}\n" for index, text in pairs))
    karpathy = [
        {"filename": name, "split": ["train", "val", "test"][index % 3], "sentences": [{"raw": text} for text in texts]}
        for index, (name, texts) in enumerate(zip(names, captions, strict=True))
    ]
    (photos / "karpathy").write_text(json.dumps({"images": karpathy, "dataset": "coco"}))
    encoder = random_encoder("resnet18", "layer2", num_images=8)
    weights = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    (folder / "text.csv").write_text("image,caption\n,a big red wall\n13.jpg,a wall is green\n")
    (folder / "preset.yaml").write_text(_DATASET)
    for name in ("coco", "flickr8k", "karpathy"):
        file = (photos / name).rename(photos / f"{name}.{'csv' if name == 'flickr8k' else 'json'}").name
        params = Path(shutil.copy(ROOT / "params.yaml", folder / f"{name}.yaml"))
        source = f'dataset.captions=[{{file: {file}, folder: ".", split: null}}]'
        splits = ["dataset.splits=null"] if name == "karpathy" else []
        use(folder / "preset.yaml", [*_SETTINGS.split(), f"dataset.format={name}", source, *splits], params)
    (folder / "coco.yaml").rename(folder / "params.yaml")
    for name, words in {"a.json": "a red wall", "b.json.gz": "the wall"}.items():
        content = json.dumps([{"image_id": index, "caption": words} for index in range(NUM_IMAGES)]).encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def write_checkpoint(folder: Path) -> None:
    """Write the checkpoint of the run in data/.work after a few optimizer steps."""
    params = load(folder / "params.yaml", "train", TrainParams)
    work = folder / "data" / ".work" / "train" / run_fingerprint(params, paths_of(folder / "data", folder), 1)
    take_steps(make_trainer(folder / "data", work, params), 3)


class CommandServer:
    """A process that runs command lines in folders."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.tiny_run"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, command: str) -> tuple[int, str, str]:
        """Run a command line in a folder.

        Returns:
            Exit status, or minus the signal that ended the command; SIGALRM is that of the timeout. Then the texts on
            standard output and standard error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(folder), command]), file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        stdout, stderr = (folder.with_suffix(suffix).read_text(errors="replace") for suffix in (".stdout", ".stderr"))
        return status, stdout, stderr

    def __enter__(self) -> "CommandServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()


def _serve() -> None:
    for module in ("h5py", "matplotlib.pyplot", "spacy", "torch", "torchvision", "pipeline.app.training"):
        import_module(module)
    for path in sorted([*ROOT.glob("stages/*.py"), *ROOT.glob("pipeline/**/*.py")]):
        if path.parent.name != "app":
            import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    gc.freeze()  # so that collections in the children do not copy the memory
    for line in sys.stdin:
        folder, command = json.loads(line)
        child = os.fork()
        if child == 0:
            _run_and_exit(Path(folder), command)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run_and_exit(folder: Path, command: str) -> None:
    """Run a command in this process, and exit without the slow cleanup of all modules."""
    signal.alarm(TIMEOUT)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    os.chdir(folder)
    for descriptor, path in enumerate((os.devnull, folder.with_suffix(".stdout"), folder.with_suffix(".stderr"))):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    status: Any = 0
    try:
        _run(shlex.split(command))
    except SystemExit as exit_:
        status = exit_.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(words: list[str]) -> None:
    if words[0] == "gridcap":
        sys.argv = words
        cli.main()
    elif words[:2] == ["python", "-m"]:
        sys.argv = words[2:]
        errors.run(import_module(words[2]).main)
    else:
        _show_training_page()


def _show_training_page() -> None:
    """Run the training page of the app, and exit."""
    # Imported here, since the module makes a temporary folder, which only one process may delete.
    from streamlit.testing.v1 import AppTest

    def script() -> None:
        from pipeline.app.training import page

        page()

    app = AppTest.from_function(script).run(timeout=TIMEOUT)
    for error in app.exception:
        print("Traceback", error.message, *error.stack_trace, sep="\n", file=sys.stderr)
    sys.exit(len(app.exception))


if __name__ == "__main__":
    _serve()
