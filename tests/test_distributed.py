import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.distributed import SINGLE_PROCESS, init_processes

ROOT = Path(__file__).parents[1]

# Each rank writes into a file of its own what it saw, and which threads of gloo are left when its process ends.
PROGRAM = """
import atexit, json, sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import UserError, run
from pipeline.distributed import open_ranks

seen = {}

def threads_of_gloo():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)

def report():
    Path(sys.argv[1], f"{seen['rank']}.json").write_text(json.dumps(seen | {"threads left": threads_of_gloo()}))

def work(ranks, fails):
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.full((1, 2), ranks.rank + 1.0)).sum().backward()
    seen.update(
        rank=ranks.rank,
        gathered=ranks.gather(f"of {processes.rank}"),
        summed=ranks.sum(torch.tensor([1, ranks.rank])).tolist(),
        first=ranks.from_first(f"of {processes.rank}"),
        gradient=model.module.weight.grad.tolist(),
        threads=threads_of_gloo(),
    )
    if fails:
        raise UserError("a file is bad")

def main(folder: str, fails: bool = False):
    atexit.register(report)
    with open_ranks() as ranks:
        work(ranks, fails)

run(main)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_two_ranks_share_what_they_have_and_leave_no_thread(tmp_path: Path, fails: bool) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(program), str(tmp_path)]
    done = subprocess.run(
        [*launch, *(["--fails"] if fails else [])],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert (done.returncode != 0) == fails, done.stderr
    assert ("error: a file is bad" in done.stderr) == fails
    # The launcher may end the other rank of one that failed, before it can report.
    reports = sorted(tmp_path.glob("*.json"))
    assert len(reports) >= (1 if fails else 2)
    for report in reports:
        seen = json.loads(report.read_text())
        assert seen.pop("threads") > 0
        assert seen == {
            "rank": int(report.stem),
            "gathered": ["of 0", "of 1"],
            "summed": [2, 1],
            "first": "of 0",
            "gradient": [[1.5, 1.5], [1.5, 1.5]],
            "threads left": 0,
        }


def test_one_process_is_all_ranks() -> None:
    with init_processes() as processes:
        assert processes is SINGLE_PROCESS
        assert processes.is_main
        assert processes.gather(3) == [3]
        assert processes.sum(torch.tensor([2])).tolist() == [2]
        assert processes.broadcast("a") == "a"
