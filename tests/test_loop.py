"""The training loop: live metrics and the log."""

import json
import logging
import math
from pathlib import Path

import pytest

from pipeline.training.loop import Intervals
from tests.factories import decoder_params, train_params
from tests.tiny_dataset import EVERY_FEATURE, NUM_REGIONS, make_trainer, take_steps, train_tiny


def read_live(folder: Path, name: str) -> list[tuple[int, float]]:
    path = folder / "live" / "plots" / "metrics" / f"{name}.tsv"
    header, *rows = [line.split("\t") for line in path.read_text().splitlines()]
    assert header == ["step", name.split("/")[-1]]
    return [(int(step), float(value)) for step, value in rows]


def test_live_rows_are_those_of_the_first_step_and_of_every_interval() -> None:
    intervals = Intervals(checkpoint_steps=1, checkpoint_seconds=1.0, live_steps=3)
    assert [step for step in range(1, 11) if intervals.is_live(step)] == [1, 3, 6, 9]


@pytest.mark.slow
def test_live_metrics_of_a_resumed_run_have_each_step_once(data: Path, tmp_path: Path) -> None:
    train_tiny(data, tmp_path, EVERY_FEATURE)  # leaves live metrics of steps 1 to 9
    take_steps(make_trainer(data, tmp_path, EVERY_FEATURE), 5)
    (tmp_path / "model" / "config.json").unlink()  # so that the run is not up to date
    train_tiny(data, tmp_path, EVERY_FEATURE)

    loss = read_live(tmp_path, "train/loss")
    assert [step for step, _ in loss] == list(range(1, 10))
    assert loss[-1][1] < loss[0][1]
    assert [step for step, _ in read_live(tmp_path, "val_cider")] == [3, 6, 9]
    names = {path.stem for path in (tmp_path / "live" / "plots" / "metrics" / "train").iterdir()}
    assert names == {
        "loss",
        "learning_rate",
        "gradient_norm",
        "attention_entropy",
        "captions_per_second",
        "data_wait_fraction",
    }
    latest = json.loads((tmp_path / "live" / "metrics.json").read_text())
    assert 0 <= latest["train"]["attention_entropy"] <= math.log(NUM_REGIONS)
    assert 0 <= latest["train"]["data_wait_fraction"] <= 1
    assert latest["step"] == 9


def test_entropy_is_logged_for_live_steps(data: Path, tmp_path: Path) -> None:
    params = train_params(decoder=decoder_params(), max_epochs=1)
    trainer = make_trainer(data, tmp_path, params)
    next(trainer.train_epoch(lambda _: True))
    (first,) = trainer.read_metrics()
    train_tiny(data, tmp_path / "run", params, live_steps=2)
    entropy = read_live(tmp_path / "run", "train/attention_entropy")
    assert [step for step, _ in entropy] == [1, 2, 4]
    assert entropy[0][1] == pytest.approx(first.attention_entropy)


def test_epochs_and_sample_captions_are_logged(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gridcap"):
        train_tiny(data, tmp_path / "run", train_params(max_epochs=2))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split("  ")[0] for line in lines if "val_cider" in line] == ["epoch 1", "epoch 2"]
    assert len([line for line in lines if line.startswith("  image ")]) == 2 * 3
