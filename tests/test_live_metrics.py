import json
from pathlib import Path

import pytest

from pipeline.training.live_metrics import LiveMetrics

PLOTS = Path("plots") / "metrics" / "train"


def steps(path: Path) -> list[int]:
    head, *rows = path.read_text().splitlines()
    assert head == f"step\t{path.stem}"
    return [int(row.split("\t")[0]) for row in rows]


def test_a_resumed_run_goes_on_where_its_checkpoint_stands(tmp_path: Path) -> None:
    live = LiveMetrics(tmp_path, 0)
    for step in (1, 10, 20):
        live.log(step, {"train/loss": 1 / step})

    LiveMetrics(tmp_path, 12).log(13, {"train/loss": 0.5})

    assert steps(tmp_path / PLOTS / "loss.tsv") == [1, 10, 13]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"train": {"loss": 0.5}, "step": 13}


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6, 0.95])
def test_files_that_a_kill_cut_are_no_hindrance(tmp_path: Path, kept: float) -> None:
    live = LiveMetrics(tmp_path, 0)
    for step in (10, 20):
        live.log(step, {"train/loss": 1 / 3, "train/rate": 0.1})
    for name in (PLOTS / "loss.tsv", Path("metrics.json")):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(kept * len(content))])

    LiveMetrics(tmp_path, 20).log(30, {"train/loss": 0.25, "train/rate": 0.1})

    assert steps(tmp_path / PLOTS / "rate.tsv") == [10, 20, 30]
    whole = steps(tmp_path / PLOTS / "loss.tsv")
    assert whole == ([10, 30] if kept > 0.5 else [30])
    assert json.loads((tmp_path / "metrics.json").read_text())["train"]["loss"] == 0.25


def test_a_run_from_the_start_drops_what_there_was(tmp_path: Path) -> None:
    LiveMetrics(tmp_path, 0).log(7, {"train/loss": 1.0})
    LiveMetrics(tmp_path, 0).log(1, {"train/loss": 2.0})
    assert steps(tmp_path / PLOTS / "loss.tsv") == [1]
