"""Live metrics of new and resumed runs."""

import json
from pathlib import Path

import pytest

from pipeline.training.live_metrics import LiveMetrics

TRAIN = Path("plots") / "metrics" / "train"


def steps(path: Path) -> list[int]:
    header, *rows = path.read_text().splitlines()
    assert header == f"step\t{path.stem}"
    return [int(row.split("\t")[0]) for row in rows]


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path: Path) -> None:
    live = LiveMetrics(tmp_path, global_step=0)
    for step in (1, 10, 20):
        live.log(step, {"train/loss": 1 / step})
    live.log(10, {"val_loss": 3.5})

    LiveMetrics(tmp_path, global_step=12).log(13, {"train/loss": 0.5})

    assert steps(tmp_path / TRAIN / "loss.tsv") == [1, 10, 13]
    latest = {"train": {"loss": 0.5}, "val_loss": 3.5, "step": 13}
    assert json.loads((tmp_path / "metrics.json").read_text()) == latest


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 0.95])
def test_a_resumed_run_repairs_truncated_files(tmp_path: Path, fraction: float) -> None:
    live = LiveMetrics(tmp_path, global_step=0)
    for step in (10, 20):
        live.log(step, {"train/loss": 1 / 3, "train/learning_rate": 0.1})
    for name in (TRAIN / "loss.tsv", Path("metrics.json")):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(fraction * len(content))])

    LiveMetrics(tmp_path, global_step=20).log(30, {"train/loss": 0.25, "train/learning_rate": 0.1})

    assert steps(tmp_path / TRAIN / "learning_rate.tsv") == [10, 20, 30]
    assert steps(tmp_path / TRAIN / "loss.tsv") == ([10, 30] if fraction > 0.5 else [30])
    assert json.loads((tmp_path / "metrics.json").read_text())["train"]["loss"] == 0.25


@pytest.mark.parametrize(
    ("rows", "latest"),
    [
        (b"10\t0.5\n\xff\xfe\t1\n20\t0.25\n", b"\xff\xfe"),
        (b"10\t0.5\nnan\t1\n20\t0.25\n", b"[]"),
        (b"10\t0.5\n15\tnan\n20\t0.25\n", b'{"step": "x"}'),
        (b"10\t0.5\n15\n20\t0.25\n", b"[" * 10_000),
        (b"10\t0.5\n" + b"9" * 5000 + b"\t1\n20\t0.25\n", b'{"step": 1' + b"0" * 5000 + b"}"),
    ],
)
def test_a_resumed_run_drops_damaged_rows_and_files(tmp_path: Path, rows: bytes, latest: bytes) -> None:
    LiveMetrics(tmp_path, global_step=0).log(10, {"train/loss": 0.5})
    (tmp_path / TRAIN / "loss.tsv").write_bytes(b"step\tloss\n" + rows)
    (tmp_path / "metrics.json").write_bytes(latest)

    LiveMetrics(tmp_path, global_step=20).log(30, {"train/loss": 0.125})

    assert steps(tmp_path / TRAIN / "loss.tsv") == [10, 20, 30]
    assert json.loads((tmp_path / "metrics.json").read_text())["train"]["loss"] == 0.125


def test_a_new_run_drops_the_metrics_of_the_last(tmp_path: Path) -> None:
    LiveMetrics(tmp_path, global_step=0).log(7, {"train/loss": 1.0})
    LiveMetrics(tmp_path, global_step=0).log(1, {"train/loss": 2.0})
    assert steps(tmp_path / TRAIN / "loss.tsv") == [1]
