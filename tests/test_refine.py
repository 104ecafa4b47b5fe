"""Stage `refine` on a small dataset: it resumes after signals, checks its inputs, and passes a model on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.decoder.model_io import (
    CONFIG_FILE,
    REFINE_HISTORY_FILE,
    WEIGHTS_FILE,
    model_files,
    read_history,
    read_model,
    read_refine_history,
    record_provenance,
)
from pipeline.errors import UserError
from pipeline.import_graph import reachable
from pipeline.training.loop import Intervals
from pipeline.training.refine import refine, refine_in, run_fingerprint
from pipeline.training.self_critical import RefineParams
from tests.command_line import torchrun
from tests.factories import decoder_params, refine_params, small_spec, train_params
from tests.feature_stores import write_store
from tests.test_train import interrupt_in_epoch_3
from tests.tiny_dataset import paths_of, read_files, train_tiny

CPU = torch.device("cpu")
INTERVALS = Intervals(checkpoint_steps=10**9, checkpoint_seconds=1e9, live_steps=1)

PARAMS_YAML = """
refine:
  max_epochs: 6
  seed: 3
  batch_size: 5
  num_samples: 3
  baseline: mean
  bleu4_weight: 1.0
  cross_entropy_weight: 0.2
  lr: {peak: 0.01, warmup_steps: 2, schedule: cosine, step_epochs: 1, step_factor: 1.0}
  max_grad_norm: 5.0
  ema_decay: 0.9
  precision: float32
  select_by: cider
  patience: 99
  max_length: 6
"""


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model on the small dataset."""
    params = train_params(max_epochs=4, decoder=decoder_params(dropout=0.2))
    model = train_tiny(data, tmp_path_factory.mktemp("trained") / "run", params)
    record_provenance(model, "data/images", "data/encoder.safetensors")
    return model


def refine_tiny(data: Path, trained: Path, folder: Path, params: RefineParams) -> Path:
    """Refine in `folder`, which also gets the live metrics, and return the finished model folder."""
    folder.mkdir(exist_ok=True)
    return refine_in(folder, trained, params, paths_of(data, folder), CPU, INTERVALS)


def stage_command(data: Path, trained: Path, out: Path, work: Path, params_yaml: str = PARAMS_YAML) -> list[str]:
    params = out.with_name(f"{out.name}-params.yaml")
    params.write_text(params_yaml)
    flags = {"params": params, "tokens": data / "tokens", "features": data / "features", "trained": trained}
    flags |= {"out": out, "work": work, "live": work / "live"}
    command = [sys.executable, "-m", "stages.refine_decoder", "--checkpoint-seconds", "0", "--device", "cpu"]
    return command + [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
def test_an_interrupted_stage_resumes_to_the_same_bytes(
    data: Path, trained: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    uninterrupted = stage_command(data, trained, tmp_path / "uninterrupted", tmp_path / "work-uninterrupted")
    subprocess.run(uninterrupted, check=True, capture_output=True)
    command = stage_command(data, trained, tmp_path / "out", tmp_path / "work")
    status, _ = interrupt_in_epoch_3(command, lambda pid: os.kill(pid, signum))
    assert status == -signum
    assert not (tmp_path / "out").exists()
    resumed = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "refine: resuming from" in resumed.stderr
    assert read_files(tmp_path / "out") == read_files(tmp_path / "uninterrupted")
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "refine: " in again.stderr
    assert "up to date" in again.stderr
    assert "epoch" not in again.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_refine_like_one_and_resume_to_the_same_bytes(data: Path, trained: Path, tmp_path: Path) -> None:
    """Batches of 5 images are shares of 3 and 2. Rounding can change a sample, so only the first epoch is compared."""

    def rewards(model: Path) -> list[float]:
        return [row["train_reward"] for row in json.loads((model / REFINE_HISTORY_FILE).read_text())]

    def launch(name: str) -> list[str]:
        command = stage_command(data, trained, tmp_path / name, tmp_path / f"work-{name}")
        return torchrun(command, tmp_path / "logs")

    subprocess.run(
        stage_command(data, trained, tmp_path / "one", tmp_path / "work-one"), check=True, capture_output=True
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = subprocess.run(launch("two"), env=environment, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert rewards(tmp_path / "two")[1] == pytest.approx(rewards(tmp_path / "one")[1], rel=1e-2)
    assert len(rewards(tmp_path / "two")) == 7

    def kill_children(pid: int) -> None:
        for child in psutil.Process(pid).children():
            child.kill()

    interrupt_in_epoch_3(launch("killed"), kill_children, env=environment)
    resumed = subprocess.run(launch("killed"), env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("resuming from") == 1
    assert read_files(tmp_path / "killed") == read_files(tmp_path / "two")


def test_a_refined_model_keeps_the_facts_of_its_training(data: Path, trained: Path, tmp_path: Path) -> None:
    with refine(trained, refine_params(), paths_of(data, tmp_path), CPU, INTERVALS) as model:
        before, after = read_model(trained).config, read_model(model).config
        assert after.refinement is not None
        assert after.refinement.trained_fingerprint == before.fingerprint
        assert after.refinement.selected_by == "cider"
        assert after.fingerprint == model.parent.name != before.fingerprint
        assert replace(after, fingerprint=before.fingerprint, refinement=None) == before
        assert after.decoder.dropout == 0.2
        assert {path.name for path in model.iterdir()} == set(model_files(after))
        assert read_history(model, after) == read_history(trained, before)
        history = read_refine_history(model, after)
        assert [row["epoch"] for row in history] == [0, 1, 2]
        assert history[0]["val_loss"] == pytest.approx(read_history(trained, before)[before.epoch - 1]["val_loss"])
    assert not (model.parent / "checkpoint.safetensors").exists()


def test_live_metrics_have_reward_baseline_and_samples(data: Path, trained: Path, tmp_path: Path) -> None:
    refine_tiny(data, trained, tmp_path, refine_params(max_epochs=1))
    names = {path.stem for path in (tmp_path / "live" / "plots" / "metrics" / "refine").glob("*.tsv")}
    assert {"reward", "baseline", "bad_endings", "distinct", "length", "gradient_norm", "learning_rate"} <= names
    assert "captions_per_second" in names


@pytest.mark.parametrize("name", [WEIGHTS_FILE, REFINE_HISTORY_FILE, CONFIG_FILE])
def test_a_damaged_finished_model_is_refined_again(
    data: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    params = refine_params(max_epochs=1)
    model = refine_tiny(data, trained, tmp_path, params)
    expected = read_files(model)
    (model / name).write_bytes((model / name).read_bytes()[:-9])
    assert read_files(refine_tiny(data, trained, tmp_path, params)) == expected
    assert "refine: the finished model is damaged" in caplog.text


@pytest.mark.slow
def test_without_epochs_the_trained_model_is_published(data: Path, trained: Path, tmp_path: Path) -> None:
    command = stage_command(
        data, trained, tmp_path / "out", tmp_path / "work", PARAMS_YAML.replace("max_epochs: 6", "max_epochs: 0")
    )
    subprocess.run(command, check=True, capture_output=True)
    assert read_files(tmp_path / "out") == read_files(trained)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("max_epochs", [0, 1])
def test_a_damaged_trained_model_is_an_error(data: Path, trained: Path, tmp_path: Path, max_epochs: int) -> None:
    shutil.copytree(trained, tmp_path / "trained")
    (tmp_path / "trained" / "history.json").write_text("[]")
    params = refine_params(max_epochs=max_epochs)
    with (
        pytest.raises(UserError, match=r"history\.json: has 0 epochs"),
        refine(tmp_path / "trained", params, paths_of(data, tmp_path), CPU, INTERVALS),
    ):
        pass


def test_a_new_provenance_is_recorded_without_another_run(data: Path, trained: Path, tmp_path: Path) -> None:
    def run(folder: Path) -> dict[str, Any]:
        with refine(folder, refine_params(max_epochs=1), paths_of(data, tmp_path), CPU, INTERVALS) as model:
            config: dict[str, Any] = json.loads((model / CONFIG_FILE).read_text())
            del config["document_digest"]
            return config

    before = run(trained)
    shutil.copytree(trained, tmp_path / "trained")
    record_provenance(tmp_path / "trained", "elsewhere", None)
    assert run(tmp_path / "trained") == before | {"dataset": "elsewhere", "encoder_weights": None}


def test_features_of_another_encoder_are_an_error(data: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "tokens", tmp_path / "tokens")
    grids = torch.zeros(32, 4, 6).half().numpy()
    write_store(tmp_path / "features", small_spec(channels=6, image_height=64, image_width=64), range(32), grids)
    with pytest.raises(UserError, match=rf"{trained}: was trained on features .*Run `dvc repro train`"):
        refine_tiny(tmp_path, trained, tmp_path / "run", refine_params())


def test_the_fingerprint_depends_on_params_inputs_weights_and_processes(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    config, params, paths = read_model(trained).config, refine_params(), paths_of(data, tmp_path)
    name = run_fingerprint(trained, config, params, paths, 1)
    assert run_fingerprint(trained, replace(config, dataset="elsewhere"), params, paths, 1) == name
    shutil.copytree(trained, tmp_path / "other")
    (tmp_path / "other" / WEIGHTS_FILE).write_bytes(b"other")
    changed = {
        run_fingerprint(trained, config, replace(params, seed=9), paths, 1),
        run_fingerprint(trained, replace(config, fingerprint="1"), params, paths, 1),
        run_fingerprint(tmp_path / "other", config, params, paths, 1),
        run_fingerprint(trained, config, params, paths, 2),
    }
    assert len(changed | {name}) == 5


def test_only_what_refines_a_model_is_in_its_fingerprint() -> None:
    modules = set(reachable("pipeline.training.self_critical"))
    assert {"pipeline.training.trainer", "pipeline.metrics.diversity"} <= modules
    assert not {f"pipeline.training.{name}" for name in ("live_metrics", "loop", "train", "refine")} & modules
