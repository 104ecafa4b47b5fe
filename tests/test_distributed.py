import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.distributed import SINGLE_PROCESS, init_processes
from tests.command_line import torchrun
from tests.paths import ROOT

# Each rank writes its results, and the number of gloo threads that are alive at exit, to a file.
PROGRAM = """
import atexit, json, sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import UserError, run
from pipeline.distributed import init_processes

values = {}

def gloo_threads():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)

def report():
    Path(sys.argv[1], f"{values['rank']}.json").write_text(json.dumps(values | {"threads at exit": gloo_threads()}))

def work(processes, fails):
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.full((1, 2), processes.rank + 1.0)).sum().backward()
    values.update(
        rank=processes.rank,
        gathered=processes.gather(f"rank {processes.rank}"),
        summed=processes.sum(torch.tensor([1, processes.rank])).tolist(),
        broadcast=processes.broadcast(f"rank {processes.rank}"),
        gradient=model.module.weight.grad.tolist(),
        threads=gloo_threads(),
    )
    if fails:
        raise UserError("a file is bad")

def main(folder: str, fails: bool = False):
    atexit.register(report)
    with init_processes() as processes:
        work(processes, fails)

run(main)
"""


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.slow
def test_two_processes_communicate_and_leave_no_thread(tmp_path: Path, fails: bool) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = torchrun([sys.executable, str(program), str(tmp_path)], tmp_path / "logs")
    result = subprocess.run(
        [*launch, *(["--fails"] if fails else [])],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert (result.returncode != 0) == fails, result.stderr
    assert ("error: a file is bad" in result.stderr) == fails
    # When a rank fails, the launcher may terminate the other one before it writes its file.
    reports = sorted(tmp_path.glob("*.json"))
    assert len(reports) >= (1 if fails else 2)
    for report in reports:
        values = json.loads(report.read_text())
        assert values.pop("threads") > 0
        assert values == {
            "rank": int(report.stem),
            "gathered": ["rank 0", "rank 1"],
            "summed": [2, 1],
            "broadcast": "rank 0",
            "gradient": [[1.5, 1.5], [1.5, 1.5]],
            "threads at exit": 0,
        }


def test_a_single_process_is_rank_0() -> None:
    with init_processes() as processes:
        assert processes is SINGLE_PROCESS
        assert processes.is_main
        assert processes.gather(3) == [3]
        assert processes.sum(torch.tensor([2])).tolist() == [2]
        assert processes.broadcast("a") == "a"
