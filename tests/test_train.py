"""Stage `train` on a small dataset: it resumes after signals, checks its inputs and trains only when they changed."""

import csv
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline import import_graph
from pipeline.artifacts import publish
from pipeline.captions.records import Record
from pipeline.captions.tokens import TOKENS_FILE
from pipeline.captions.vocabulary import VOCABULARY_FILE, Vocabulary, read_vocabulary, write_vocabulary
from pipeline.decoder.decoder import DecoderKind
from pipeline.decoder.model_io import WEIGHTS_FILE, model_files
from pipeline.errors import UserError
from pipeline.features.encoding import encode
from pipeline.import_graph import reachable
from pipeline.training.loop import Intervals
from pipeline.training.train import run_fingerprint, train
from tests.command_line import torchrun
from tests.factories import decoder_params, encode_params, lr_params, train_params
from tests.kinds import all_kinds_exhaustively
from tests.model_folders import model_config
from tests.paths import REAL
from tests.tiny_dataset import paths_of, read_files, train_tiny, write_token_files

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained_files(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return read_files(train_tiny(data, tmp_path_factory.mktemp("model") / "run", train_params(max_epochs=1)))


PARAMS_YAML = """
dataset: {root: data/images}
encode: {weights: data/encoder.safetensors}
train:
  seed: 3
  start_from: null
  start_from_grids: refuse
  text: null
  text_pretraining: {max_epochs: 2, joint_weight: 1.0, num_regions: 1, ridge_penalty: 1.0, noise: 0.0}
  decoder:
    {kind: soft_attention, embedding_size: 8, hidden_size: 12, attention_size: 8, non_local_size: 0,
     dropout: 0.2, region_dropout: 0.1, word_dropout: 0.1}
  batch_size: 5
  gradient_accumulation_steps: 2
  random_views: false
  max_epochs: 7
  optimizer: adamw
  weight_decay: 0.01
  lr: {peak: 0.01, warmup_steps: 2, schedule: cosine, step_epochs: 1, step_factor: 1.0}
  max_grad_norm: 5.0
  label_smoothing: 0.1
  scheduled_sampling: 0.2
  doubly_stochastic_weight: 0.1
  ema_decay: 0.9
  precision: float32
  compile: false
  select_by: cider
  patience: 99
  max_length: 6
"""


def stage_command(data: Path, out: Path, work: Path, params_yaml: str = PARAMS_YAML) -> list[str]:
    params = out.with_name(f"{out.name}-params.yaml")
    params.write_text(params_yaml)
    flags = {"params": params, "tokens": data / "tokens", "features": data / "features"}
    flags |= {"out": out, "work": work, "live": work / "live"}
    command = [sys.executable, "-m", "stages.train_decoder", "--checkpoint-seconds", "0", "--device", "cpu"]
    return command + [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def interrupt_in_epoch_3(command: list[str], interrupt: Callable[[int], object], **options: Any) -> tuple[int, str]:
    """Run a stage, call `interrupt` with its process id after epoch 3, and return exit status and later messages."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options) as process:
        assert process.stderr is not None
        while "epoch 3" not in process.stderr.readline():
            assert process.poll() is None
        interrupt(process.pid)
        messages = process.stderr.read()
    return process.returncode, messages


@pytest.fixture(scope="module")
def uninterrupted_files(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    subprocess.run(stage_command(data, folder / "out", folder / "work"), check=True, capture_output=True)
    return read_files(folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_stage_resumes_to_the_same_bytes(
    data: Path, tmp_path: Path, uninterrupted_files: dict[str, bytes], signum: signal.Signals
) -> None:
    command = stage_command(data, tmp_path / "out", tmp_path / "work")
    status, _ = interrupt_in_epoch_3(command, lambda pid: os.kill(pid, signum))
    assert status == -signum
    assert not (tmp_path / "out").exists()
    resumed = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "resuming from" in resumed.stderr
    assert read_files(tmp_path / "out") == uninterrupted_files
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "up to date" in again.stderr
    assert "epoch" not in again.stderr


@pytest.mark.slow
def test_params_changed_during_the_run_are_an_error(data: Path, tmp_path: Path) -> None:
    command = stage_command(data, tmp_path / "out", tmp_path / "work")
    params = tmp_path / "out-params.yaml"
    changed = PARAMS_YAML.replace("seed: 3", "seed: 4")
    status, messages = interrupt_in_epoch_3(command, lambda _: params.write_text(changed))
    assert status == 2
    assert str(params) in messages
    assert "section train was changed" in messages
    assert not (tmp_path / "out").exists()
    params.write_text(PARAMS_YAML)
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "up to date" in again.stderr
    assert (tmp_path / "out").is_dir()


@pytest.mark.slow
def test_a_missing_input_is_named_without_a_traceback(data: Path, tmp_path: Path) -> None:
    command = stage_command(data, tmp_path / "out", tmp_path / "work")
    command[command.index("--tokens") + 1] = str(tmp_path / "absent")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert str(tmp_path / "absent" / TOKENS_FILE) in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@all_kinds_exhaustively
def test_two_processes_give_the_losses_of_one_and_resume_to_the_same_bytes(
    data_with_text: Path, tmp_path: Path, kind: DecoderKind
) -> None:
    """Without dropout the losses agree to rounding; batches of 5 images are shares of 3 and 2.

    Training begins with pretraining on captions without images.
    """
    text = PARAMS_YAML.replace("soft_attention", kind)
    text = text.replace("dropout: 0.2", "dropout: 0.0").replace("dropout: 0.1", "dropout: 0.0")
    text = text.replace("scheduled_sampling: 0.2", "scheduled_sampling: 0.0").replace("epochs: 7", "epochs: 5")

    def losses(model: Path) -> list[float]:
        return [row["train_loss"] for row in json.loads((model / "history.json").read_text())]

    def launch(name: str) -> list[str]:
        command = stage_command(data_with_text, tmp_path / name, tmp_path / f"work-{name}", text)
        return torchrun(command, tmp_path / "logs")

    one = stage_command(data_with_text, tmp_path / "one", tmp_path / "work-one", text)
    subprocess.run(one, check=True, capture_output=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = subprocess.run(launch("two"), env=environment, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)

    def kill_children(pid: int) -> None:
        for child in psutil.Process(pid).children():
            child.kill()

    interrupt_in_epoch_3(launch("killed"), kill_children, env=environment)
    resumed = subprocess.run(launch("killed"), env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("resuming from") == 1
    assert read_files(tmp_path / "killed") == read_files(tmp_path / "two")


@pytest.mark.slow
def test_the_lock_is_held_while_the_model_is_published(data: Path, tmp_path: Path) -> None:
    intervals = Intervals(checkpoint_steps=1, checkpoint_seconds=1e9, live_steps=1)
    with train(train_params(max_epochs=1), paths_of(data, tmp_path), CPU, intervals) as model:
        assert (model / WEIGHTS_FILE).is_file()
        lock = model.parent.with_name(f"{model.parent.name}.lock")
        with lock.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_finished_run_leaves_no_checkpoint(data: Path, tmp_path: Path) -> None:
    model = train_tiny(data, tmp_path, train_params(max_epochs=1))
    assert {path.name for path in tmp_path.iterdir()} == {"live", model.name}


@pytest.mark.slow
def test_the_fingerprint_depends_on_params_inputs_and_processes(data: Path, tmp_path: Path) -> None:
    params, paths = train_params(), paths_of(data, tmp_path)
    name = run_fingerprint(params, paths, 1)
    assert run_fingerprint(params, paths_of(data, tmp_path / "elsewhere"), 1) == name
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    assert run_fingerprint(params, paths_of(copy, tmp_path), 1) == name
    with (copy / "tokens" / TOKENS_FILE).open("ab") as file:
        file.write(b"0")
    changed = {
        run_fingerprint(replace(params, seed=4), paths, 1),
        run_fingerprint(params, paths, 2),
        run_fingerprint(params, paths_of(copy, tmp_path), 1),
    }
    assert len(changed | {name}) == 4


def test_only_what_trains_a_model_is_in_its_fingerprint() -> None:
    """A change to a page, a live metric or the version number must not retrain a model."""
    modules = reachable("pipeline.training.trainer")
    assert {"pipeline.training.loss", "pipeline.metrics.cider", "pipeline.generation.search"} <= set(modules)
    packages = {name.split(".")[1] for name in modules if "." in name}
    assert not packages & {"report", "evaluation", "prediction", "app", "scenes", "cli"}
    assert not {f"pipeline.training.{name}" for name in ("live_metrics", "loop", "train", "throughput")} & set(modules)


@pytest.mark.slow
def test_the_version_number_is_not_in_the_fingerprint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_fingerprint(train_params(), paths_of(data, tmp_path), 1)
    parse = import_graph._parse
    other = tmp_path / "other.py"
    other.write_text('__version__ = "99"\n')
    monkeypatch.setattr(
        import_graph,
        "_parse",
        lambda name: parse(name) if name != "pipeline" else import_graph.ast.parse(other.read_bytes()),
    )
    assert run_fingerprint(train_params(), paths_of(data, tmp_path), 1) == before


def test_nothing_is_trained_on_an_altered_shard(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    shard = next((tmp_path / "features").glob("shard-*.h5"))
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError) as caught:
        train_tiny(tmp_path, tmp_path / "run", train_params())
    assert f"{shard}: SHA-256 differs from index.json" in str(caught.value)
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name != "live"] == []


def test_tokens_of_another_vocabulary_are_rejected(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / "tokens" / VOCABULARY_FILE
    words = read_vocabulary(path).words
    write_vocabulary(path, Vocabulary((*words[:4], *reversed(words[4:]))))
    with pytest.raises(UserError) as caught:
        train_tiny(tmp_path / "data", tmp_path / "run", train_params())
    assert TOKENS_FILE in str(caught.value)
    assert VOCABULARY_FILE in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", model_files(model_config()))
def test_a_damaged_finished_model_is_trained_again(
    data: Path, tmp_path: Path, trained_files: dict[str, bytes], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    model = train_tiny(data, tmp_path / "run", train_params(max_epochs=1))
    content = bytearray((model / name).read_bytes())
    content[-4:] = b"\xff\xff\xff\xff"
    (model / name).write_bytes(content)
    assert read_files(train_tiny(data, tmp_path / "run", train_params(max_epochs=1))) == trained_files
    assert "damaged" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/real is absent")
def test_twenty_real_images_can_be_memorized(tmp_path: Path) -> None:
    # One caption per image: several captions of one image cannot all be predicted.
    with (REAL / "flickr" / "captions.txt").open(newline="") as file:
        first = {row["image"]: row["caption"] for row in reversed(list(csv.DictReader(file)))}
    records = [
        Record(image_id=image_id, file=name, split="train", captions=(first[name],))
        for image_id, name in enumerate(sorted(first)[:20])
    ]
    records += [replace(record, image_id=record.image_id + 20, split="val") for record in records[:4]]
    encoder = encode_params(REAL / "weights" / "resnet18-imagenet-to-layer3.pth", image_size=224)
    with encode(records, REAL / "flickr" / "images", encoder, tmp_path / "work", CPU, 2) as result:
        publish(result.store, tmp_path / "features")
    write_token_files(tmp_path, records)
    params = train_params(
        decoder=decoder_params(embedding_size=64, hidden_size=256, attention_size=64),
        lr=lr_params(peak=4e-3, warmup_steps=10),
        max_epochs=60,
        patience=60,
        doubly_stochastic_weight=0.0,
        max_length=20,
    )
    model = train_tiny(tmp_path, tmp_path / "run", params)
    assert json.loads((model / "history.json").read_text())[-1]["train_loss"] < 0.1
