"""Damaged files of every kind, read by the commands of the pipeline: an error message, or an unaffected result.

`FUZZ_SEED=2 FUZZ_MUTATIONS=5000 python -m pytest tests/fuzz` tries other files. A failure prints how to repeat it.
"""

import os
import queue
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.mutations import damage
from tests.fuzz.tiny_run import CommandServer, stage_commands, write_checkpoint, write_inputs

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

SEED = int(os.environ.get("FUZZ_SEED", "1"))
NUM_MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", "512"))
CASE = os.environ.get("FUZZ_CASE")
"""Number of the only mutation to try; unset for all."""
NUM_SERVERS = 2

WORK = "data/.work"
STAGES = stage_commands()
COMMANDS = STAGES | {
    f"prepare {name}": STAGES["prepare"].replace("params.yaml", f"{name}.yaml").replace("data/prepared", name)
    for name in ("flickr8k", "karpathy")
}
COMMANDS |= {
    "use": "gridcap use preset.yaml",
    "predict": "gridcap predict photos/images/0_red.png photos/images/1_green.jpg --json --n-best 2",
    "predict exported": "gridcap predict photos/images/0_red.png --json --model exported",
    "export": "gridcap export data/model --out new --with-encoder --scores results/metrics/scores.json",
    "inspect": "gridcap inspect data",
    "inspect image": "gridcap inspect data/features --image 1 --out grid.png",
    "verify": "gridcap inspect data/features --verify",
    "score": "gridcap score a.json photos/coco.json --no-meteor --bootstrap-samples 100 --json --out scores.json",
    "score generated": "gridcap score data/generated data/prepared --no-meteor --bootstrap-samples 100 --json",
    "compare": "gridcap compare a.json b.json.gz --references photos/coco.json --no-meteor --bootstrap-samples 100",
    "training page": "training-page",
}


@dataclass(frozen=True)
class Target:
    """A kind of file, and the commands that read it."""

    files: str
    """Glob pattern."""
    commands: tuple[str, ...]
    has_digest: bool
    """Whether the digest of the file is recorded, so that no damage may change a result."""
    hidden_by: str = ""
    """Glob pattern of finished work, without which the command reads the file."""


def digested(files: str, *commands: str, hidden_by: str = "") -> Target:
    """Return a target whose digest is recorded."""
    return Target(files, commands, has_digest=True, hidden_by=hidden_by)


def free(files: str, *commands: str, hidden_by: str = "") -> Target:
    """Return a target without a digest: valid files with another content give other results."""
    return Target(files, commands, has_digest=False, hidden_by=hidden_by)


RUN = f"{WORK}/train/*"
TARGETS = [
    free("params.yaml", *STAGES, "use"),
    free("preset.yaml", "use"),
    free("photos/coco.json", "prepare", "score", "compare"),
    free("photos/flickr8k.csv", "prepare flickr8k"),
    free("photos/karpathy.json", "prepare karpathy"),
    free("photos/*.txt", "prepare", "prepare flickr8k"),
    free("photos/images/*", "encode"),
    free("photos/images/[01]_*", "predict", "inspect image"),
    free("weights.safetensors", "encode"),
    digested("weights.safetensors", "predict", "export"),
    digested("data/prepared/*", "tokenize", "encode", "generate", "evaluate", "score generated"),
    digested("data/tokens/vocabulary.json", "train", "evaluate"),
    digested("data/tokens/tokens.h5", "train", "evaluate", hidden_by=RUN),
    free("data/tokens/tokens.h5", "inspect"),
    digested("data/features/*.h5", "train", "generate", "evaluate", "verify", "encode", hidden_by=RUN),
    digested("data/features/index.json", "train", "generate", "evaluate", hidden_by=RUN),
    free("data/features/*", "inspect", "inspect image"),
    digested(f"{WORK}/encode/*/*", "encode"),
    digested(f"{RUN}/checkpoint.safetensors", "train", hidden_by=f"{RUN}/model"),
    digested(f"{RUN}/model/[cdv]*", "train", hidden_by=f"{RUN}/checkpoint.safetensors"),
    free(f"{RUN}/model/h*", "train", hidden_by=f"{RUN}/checkpoint.safetensors"),
    digested("data/trained/[cdv]*", "refine"),
    digested("data/model/[cdv]*", "generate", "evaluate", "predict", "export"),
    free("data/model/h*", "generate", "evaluate", "predict", "export"),
    free("data/generated/*", "evaluate", "inspect"),
    free("data/generated/captions.json", "score generated"),
    free("data/generated/search.json", "predict"),
    digested("exported/[cdev]*", "predict exported"),
    free("exported/*", "predict exported"),
    free("results/metrics/scores.json", "export", "training page"),
    free("results/plots/training.json", "training page"),
    free("results/live/**/*.tsv", "training page"),
    free("[ab].json*", "score", "compare"),
]

Files = dict[str, bytes | None]

_DIGESTS = re.compile(rb'"(fingerprint|document_digest)": "[0-9a-f]+"')


def read_results(folder: Path) -> Files:
    """Read all files of a run by path, without unfinished work, live metrics and the fingerprint of the model.

    The fingerprint of a model is by design that of all bytes of the tokens and the index, and its configuration has a
    digest of the fingerprint.
    """
    return {
        name: _DIGESTS.sub(b"", path.read_bytes()) if path.is_file() else None
        for path in folder.rglob("*")
        if not (name := path.relative_to(folder).as_posix()).startswith((WORK, "results/live"))
    }


class Fuzzer:
    """Mutations of a run's files, by number."""

    def __init__(self, folder: Path, servers: Sequence[CommandServer]) -> None:
        self.folder = folder
        self.run_folder = folder / "run"
        self.servers: queue.Queue[CommandServer] = queue.Queue()
        for server in servers:
            self.servers.put(server)
        write_inputs(self.run_folder)
        setup = [COMMANDS[name] for name in (*STAGES, "prepare flickr8k", "prepare karpathy")]
        for command in [*setup, "gridcap export data/model --out exported --with-encoder"]:
            status, _, stderr = self.execute(self.run_folder, command)
            assert status == 0, stderr
        write_checkpoint(self.run_folder)
        with ThreadPoolExecutor(NUM_SERVERS) as pool:
            self.expected = dict(zip(COMMANDS, pool.map(self._expect, COMMANDS), strict=True))

    def execute(self, folder: Path, command: str) -> tuple[int, str, str]:
        server = self.servers.get()
        try:
            return server.run(folder, command)
        finally:
            self.servers.put(server)

    def _expect(self, name: str) -> tuple[str, Files]:
        """Return the standard output and the files of a command on the undamaged run."""
        folder = shutil.copytree(self.run_folder, self.folder / name.replace(" ", "_"))
        status, stdout, stderr = self.execute(folder, COMMANDS[name])
        assert status == 0, f"{name}: {stderr}"
        return stdout, read_results(folder)

    def try_case(self, index: int) -> tuple[str, str]:
        """Damage a file and run a command that reads it. Return a description and the outcome."""
        rng = Random(f"{SEED} {index}")
        target = TARGETS[index % len(TARGETS)]
        folder = self.folder / f"case{index}"
        shutil.copytree(self.run_folder, folder)
        if target.hidden_by:
            for path in folder.glob(target.hidden_by):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        path = rng.choice(sorted(path for path in folder.glob(target.files) if path.is_file()))
        mutator = damage(path, rng)
        command = rng.choice(target.commands)
        before = read_results(folder)
        status, stdout, stderr = self.execute(folder, COMMANDS[command])
        name = path.relative_to(folder).as_posix()
        after = read_results(folder)
        outcome = self._judge(command, path, folder, status, stderr, before == after)
        if outcome == "accepted":
            expected_stdout, expected_files = self.expected[command]
            # Commands copy some files as they are, with keys that none of them reads.
            results = [
                {key: files[key] for key in files if Path(key).name != path.name} for files in (after, expected_files)
            ]
            is_same = stdout == expected_stdout and results[0] == results[1]
            outcome = "same result" if is_same else "CHANGED RESULT" if target.has_digest else "other result"
        shutil.rmtree(folder)
        if outcome.isupper():
            outcome += f"\n{stderr[-2000:]}"
        return f"{name}: {mutator}, read by {command}", outcome

    def _judge(self, command: str, path: Path, folder: Path, status: int, stderr: str, is_unchanged: bool) -> str:
        if status == -signal.SIGALRM:
            return "HANG"
        if status < 0:
            return f"KILLED BY SIGNAL {-status}"
        if "Traceback" in stderr:
            return "TRACEBACK"
        if status == 0:
            return "accepted"
        if status != 2 and not (status == 1 and command.startswith("predict")):
            return f"STATUS {status}"
        if "error: " not in stderr and "Usage: " not in stderr:
            return "NO ERROR MESSAGE"
        names = {path.name, path.parent.relative_to(folder).as_posix()} - {"."}
        if path.suffix == ".safetensors":
            names.add("encode.weights")  # the setting with its path
        if not any(name in stderr for name in names):
            return "FILE NOT NAMED"
        if not is_unchanged:
            return "FILES CHANGED IN SPITE OF THE ERROR"
        return "error"


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    with ExitStack() as stack:
        servers = [stack.enter_context(CommandServer()) for _ in range(NUM_SERVERS)]
        yield Fuzzer(tmp_path_factory.mktemp("fuzz"), servers)


def test_damage_is_an_error_or_has_no_effect(fuzzer: Fuzzer) -> None:
    cases = range(NUM_MUTATIONS) if CASE is None else [int(CASE)]
    with ThreadPoolExecutor(NUM_SERVERS) as pool:
        results = list(pool.map(fuzzer.try_case, cases))
    kinds = Counter(
        (TARGETS[index % len(TARGETS)].files, outcome.split("\n")[0])
        for index, (_, outcome) in zip(cases, results, strict=True)
    )
    for (kind, outcome), count in sorted(kinds.items()):
        print(f"{count:4} {kind}: {outcome}")
    faults = [
        f"{description}: {outcome}\n  repeat: FUZZ_SEED={SEED} FUZZ_CASE={index} python -m pytest tests/fuzz"
        for index, (description, outcome) in zip(cases, results, strict=True)
        if outcome.partition("\n")[0].isupper()
    ]
    assert not faults, "\n".join(faults)
