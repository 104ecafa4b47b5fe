"""Training on a small store: it learns, and it goes on to the same bits wherever it was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.captions.records import Record, Split
from pipeline.captions.tokens import TOKENS_FILE, VOCABULARY_FILE, TokenizeParams, tokenize, write_tokens
from pipeline.captions.vocabulary import write_vocabulary
from pipeline.decoder.attention import DecoderParams
from pipeline.decoder.batches import Batch
from pipeline.decoder.saved import CONFIG_FILE, WEIGHTS_FILE, read_model
from pipeline.decoder.trainer import CHECKPOINT_FILE, Trainer, TrainParams, train
from pipeline.errors import UserError
from pipeline.features.store import Setting, write_index, write_shard

P, C = 4, 6
COLOURS = ["red", "green", "blue", "black"]
SETTING = Setting(
    architecture="resnet18",
    layer="layer3",
    weights_digest="0" * 64,
    image_size=32,
    precision="float32",
    grid_height=2,
    grid_width=2,
    channels=C,
)


def params(**changes: object) -> TrainParams:
    values: dict[str, object] = {
        "seed": 3,
        "decoder": DecoderParams(embedding=8, state=12, attention=8, dropout=0.2, word_dropout=0.1),
        "images_a_batch": 5,
        "epochs": 3,
        "learning_rate": 0.01,
        "warm_up": 2,
        "decay": "cosine",
        "clip_norm": 5.0,
        "coverage_weight": 0.1,
        "select_by": "cider",
        "patience": 9,
        "max_words": 6,
    }
    return TrainParams(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose one bright region tells the colour that their captions name."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    splits: list[Split] = ["train"] * 24 + ["val"] * 8
    records, grids = [], []
    for image_id, split in enumerate(splits):
        colour = int(rng.integers(len(COLOURS)))
        grid = rng.random((P, C)).astype(np.float16) / 8
        grid[rng.integers(P), colour] = 4
        grids.append(grid)
        captions = [f"a {COLOURS[colour]} thing", f"the thing is {COLOURS[colour]}", f"{COLOURS[colour]}"]
        records.append(
            Record(image_id=image_id, file=f"{image_id}.jpg", split=split, captions=tuple(captions[: 2 + image_id % 2]))
        )
    settings_of_words = TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_words=9)
    dataset = tokenize(records, settings_of_words, folder)
    (folder / "tokens").mkdir()
    write_vocabulary(folder / "tokens" / VOCABULARY_FILE, dataset.vocabulary)
    write_tokens(folder / "tokens" / TOKENS_FILE, dataset, settings_of_words, "0")
    (folder / "features").mkdir()
    contents = [f"{image_id:064x}" for image_id in range(len(records))]
    shard = write_shard(folder / "features", SETTING, range(len(records)), contents, np.stack(grids))
    write_index(folder / "features", SETTING, [shard], dict(enumerate(contents)))
    return folder


def run(data: Path, folder: Path, settings: TrainParams) -> Path:
    folder.mkdir(exist_ok=True)
    return train(settings, data / "tokens", data / "features", folder, torch.device("cpu"), checkpoint_seconds=1e9)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The model folder of a run that nothing disturbed."""
    return files_of(run(data, tmp_path_factory.mktemp("straight") / "run", params()))


def test_a_second_run_gives_the_same_bytes(data: Path, straight: dict[str, bytes], tmp_path: Path) -> None:
    assert files_of(run(data, tmp_path / "run", params())) == straight


class _Killed(BaseException):
    """Stands for the end of the process: nothing after it is run."""


def _stopping(stop: int) -> Callable[[Trainer, Batch], float]:
    taken = 0
    step = Trainer._step

    def stopping(trainer: Trainer, batch: Batch) -> float:
        nonlocal taken
        if taken == stop:
            trainer._save()
            raise _Killed
        taken += 1
        return step(trainer, batch)

    return stopping


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.integers(min_value=1, max_value=12), min_size=1, max_size=2))
def test_a_run_stopped_after_any_steps_goes_on_to_the_same_bytes(
    data: Path, straight: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, steps: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    for stop in steps:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_step", _stopping(stop))
            try:
                run(data, folder, params())
            except _Killed:
                torch.manual_seed(999)
    assert files_of(run(data, folder, params())) == straight


PARAMS_YAML = """
train: {seed: 3, decoder: {embedding: 8, state: 12, attention: 8, dropout: 0.2, word_dropout: 0.1}, images_a_batch: 5,
  epochs: 14, learning_rate: 0.01, warm_up: 2, decay: cosine, clip_norm: 5.0, coverage_weight: 0.1, select_by: cider,
  patience: 99, max_words: 6}
"""


def stage(data: Path, out: Path, work: Path) -> list[str]:
    (data / "params.yaml").write_text(PARAMS_YAML)
    flags = {"params": data / "params.yaml", "tokens": data / "tokens", "features": data / "features"}
    flags |= {"out": out, "work": work}
    command = [sys.executable, "-m", "stages.train_decoder", "--checkpoint-seconds", "0", "--device", "cpu"]
    return command + [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_stage_goes_on_after_a_signal_to_the_same_bytes(data: Path, tmp_path: Path, number: int) -> None:
    subprocess.run(stage(data, tmp_path / "straight", tmp_path / "work-straight"), check=True, capture_output=True)
    command = stage(data, tmp_path / "out", tmp_path / "work")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        while "epoch 3" not in process.stdout.readline():
            pass
        os.kill(process.pid, number)
        process.stdout.read()
    assert process.returncode == -number
    assert not (tmp_path / "out").exists()
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "goes on from" in again.stdout
    assert files_of(tmp_path / "out") == files_of(tmp_path / "straight")
    finished = time.monotonic()
    third = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "nothing to do" in third.stdout
    assert time.monotonic() - finished < 60


def test_it_learns_which_region_tells_the_colour(data: Path, tmp_path: Path) -> None:
    decoder = DecoderParams(embedding=8, state=12, attention=8, dropout=0.0, word_dropout=0.0)
    settings_of_run = params(epochs=60, patience=99, coverage_weight=0.0, decoder=decoder)
    folder = run(data, tmp_path / "run", settings_of_run)
    history = json.loads((folder / "history.json").read_text())
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert history[-1]["val_cider"] > 1
    assert read_model(folder).config.epoch >= 1


def test_training_stops_when_nothing_gets_better(data: Path, tmp_path: Path) -> None:
    folder = run(data, tmp_path / "run", params(epochs=50, patience=2, learning_rate=1e-9))
    assert len(json.loads((folder / "history.json").read_text())) == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf) in epoch \d+, step \d+, at a learning rate of"):
        run(data, tmp_path / "run", params(learning_rate=1e30, clip_norm=1e30, warm_up=0))


def test_a_damaged_checkpoint_is_named(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / CHECKPOINT_FILE).write_bytes(b"half a checkpoint")
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: is no checkpoint"):
        run(data, folder, params())


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [
        (CONFIG_FILE, '"channels": 6', '"channels": 7', r"decoder\.safetensors: does not fit config\.json"),
        (CONFIG_FILE, '"state": 12', '"state": "x"', r"config\.json: is no model configuration"),
        (CONFIG_FILE, '"vocabulary_digest": "', '"vocabulary_digest": "f', r"vocabulary\.json has digest"),
        ("vocabulary.json", '"red"', '"pink"', r"vocabulary\.json: its words do not match"),
    ],
)
def test_a_model_folder_that_disagrees_with_itself_is_refused(
    straight: dict[str, bytes], tmp_path: Path, file: str, before: str, after: str, message: str
) -> None:
    for name, content in straight.items():
        (tmp_path / name).write_bytes(content)
    text = straight[file].decode()
    assert before in text
    (tmp_path / file).write_text(text.replace(before, after))
    with pytest.raises(UserError, match=message):
        read_model(tmp_path)


def test_a_damaged_weight_file_is_named(straight: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in straight.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / WEIGHTS_FILE).write_bytes(straight[WEIGHTS_FILE][:100])
    with pytest.raises(UserError, match=r"decoder\.safetensors: does not fit"):
        read_model(tmp_path)
