"""Training on a small store: it learns, and it goes on to the same bits wherever it was stopped."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.captions.records import Record, Split
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.captions.tokens import TOKENS_FILE, VOCABULARY_FILE, CaptionTokens, read_tokens, tokenize, write_tokens
from pipeline.captions.vocabulary import PAD, Vocabulary, read_vocabulary, write_vocabulary
from pipeline.decoder.model_io import CONFIG_FILE, WEIGHTS_FILE, read_model
from pipeline.decoder.soft_attention import DecoderParams
from pipeline.errors import UserError
from pipeline.features.encoding import encode
from pipeline.features.store import FeatureStore, write_index, write_shard
from pipeline.report.model_card import CARD_FILE, write_model_card
from pipeline.training.batches import Batch, CaptionBatches
from pipeline.training.lr_schedule import LRParams
from pipeline.training.train import TrainInputs, train_in
from pipeline.training.trainer import CHECKPOINT_FILE, Intervals, Trainer, TrainParams
from tests.factories import encode_params, small_spec

REAL = Path(__file__).parents[2] / "shared" / "real"
P, C = 4, 6
COLORS = ["red", "green", "blue", "black"]
SETTING = small_spec(channels=C)


def schedule(**changes: object) -> LRParams:
    values: dict[str, object] = {"highest": 0.01, "warm_up": 2, "decay": "cosine", "step_epochs": 1, "step_factor": 0.5}
    return LRParams(**(values | changes))  # type: ignore[arg-type]


def params(**changes: object) -> TrainParams:
    values: dict[str, object] = {
        "seed": 3,
        "decoder": DecoderParams(
            embedding_size=8, hidden_size=12, attention_size=8, dropout=0.2, region_dropout=0.1, word_dropout=0.1
        ),
        "batch_size": 5,
        "gradient_accumulation_steps": 1,
        "random_views": False,
        "epochs": 3,
        "optimizer": "adam",
        "weight_decay": 0.0,
        "learning_rate": schedule(),
        "max_grad_norm": 5.0,
        "label_smoothing": 0.0,
        "scheduled_sampling": 0.0,
        "average": 0.0,
        "precision": "float32",
        "compile": False,
        "doubly_stochastic_weight": 0.1,
        "select_by": "cider",
        "patience": 9,
        "max_length": 6,
    }
    return TrainParams(**(values | changes))  # type: ignore[arg-type]


EVERYTHING = params(
    gradient_accumulation_steps=2,
    optimizer="adamw",
    weight_decay=0.01,
    ema_decay=0.9,
    label_smoothing=0.1,
    scheduled_sampling=0.3,
    lr=schedule(schedule="step"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose one bright region tells the color that their captions name."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    splits: list[Split] = ["train"] * 24 + ["val"] * 8
    records, grids = [], []
    for image_id, split in enumerate(splits):
        color = int(rng.integers(len(COLORS)))
        grid = rng.random((P, C)).astype(np.float16) / 8
        grid[rng.integers(P), color] = 4
        grids.append(grid)
        captions = [f"a {COLORS[color]} thing", f"the thing is {COLORS[color]}", f"{COLORS[color]}"]
        records.append(
            Record(image_id=image_id, file=f"{image_id}.jpg", split=split, captions=tuple(captions[: 2 + image_id % 2]))
        )
    settings_of_words = TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_length=9)
    dataset = tokenize(records, settings_of_words, folder)
    (folder / "tokens").mkdir()
    write_vocabulary(folder / "tokens" / VOCABULARY_FILE, dataset.vocabulary)
    write_tokens(folder / "tokens" / TOKENS_FILE, dataset, settings_of_words, "0")
    (folder / "features").mkdir()
    contents = [f"{image_id:064x}" for image_id in range(len(records))]
    shard = write_shard(
        folder / "features", SETTING, range(len(records)), [(content, "whole") for content in contents], np.stack(grids)
    )
    write_index(folder / "features", SETTING, ("whole",), [shard], dict(enumerate(contents)))
    return folder


def run(data: Path, folder: Path, settings: TrainParams, live_steps: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    intervals = Intervals(checkpoint_steps=10**9, checkpoint_seconds=1e9, live_steps=live_steps)
    live = folder.parent / "live"
    return train_in(
        folder,
        settings,
        TrainInputs(tokens=data / "tokens", features=data / "features", work=folder.parent, live=live),
        torch.device("cpu"),
        intervals,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The model folder of a run that nothing disturbed."""
    return files_of(run(data, tmp_path_factory.mktemp("straight") / "run", EVERYTHING))


def test_a_second_run_gives_the_same_bytes(data: Path, straight: dict[str, bytes], tmp_path: Path) -> None:
    assert files_of(run(data, tmp_path / "run", EVERYTHING)) == straight


def test_an_altered_shard_is_named_before_anything_is_learned_from_it(data: Path, tmp_path: Path) -> None:
    for part in ("tokens", "features"):
        shutil.copytree(data / part, tmp_path / part)
    shard = next((tmp_path / "features").glob("shard-*.h5"))
    file = bytearray(shard.read_bytes())
    file[-10] ^= 1
    shard.write_bytes(file)

    with pytest.raises(UserError, match=f"{shard}: its bytes are not those that were written; encode just their"):
        run(tmp_path, tmp_path / "run", params())


def test_epochs_draw_among_the_views_and_validation_sees_the_first(tmp_path: Path) -> None:
    count, views = 40, ("whole", "whole_flipped", "center")
    keys = [(f"{image_id:064x}", view) for image_id in range(count) for view in views]
    rows = [np.full((P, C), image_id + place / 4, np.float16) for image_id in range(count) for place in range(3)]
    shard = write_shard(tmp_path, SETTING, [row // 3 for row in range(3 * count)], keys, np.stack(rows))
    write_index(tmp_path, SETTING, views, [shard], {image_id: f"{image_id:064x}" for image_id in range(count)})
    captions = CaptionTokens(
        image_id=np.arange(count), tokens=np.full((count, 3), 5), length=np.full(count, 3), captions=("",) * count
    )
    batches = CaptionBatches(captions, FeatureStore(tmp_path), 7, random_views=True)

    def shown(served: Iterator[Batch]) -> dict[int, float]:
        return {
            image_id: 4 * (float(grid[0, 0]) - image_id)
            for batch in served
            for image_id, grid in zip(batch.image_ids, batch.grids, strict=True)
        }

    assert set(shown(batches.in_order()).values()) == {0}
    first, second = shown(batches.shuffled(1, 0)), shown(batches.shuffled(1, 1))
    assert set(first.values()) == set(second.values()) == {0, 1, 2}
    assert first != second
    assert shown(batches.shuffled(1, 0)) == first
    resumed = shown(batches.shuffled(1, 0, first=3))
    assert len(resumed) < count
    assert resumed.items() <= first.items()


class _Killed(BaseException):
    """Stands for the end of the process: nothing after it is run."""


def _stopping(stop: int) -> Callable[[Trainer, list[Batch], bool], dict[str, float]]:
    taken = 0
    step = Trainer._step

    def stopping(trainer: Trainer, batches: list[Batch], shown: bool) -> dict[str, float]:
        nonlocal taken
        if taken == stop:
            trainer._save()
            raise _Killed
        taken += 1
        return step(trainer, batches, shown)

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
                run(data, folder, EVERYTHING)
            except _Killed:
                torch.manual_seed(999)
    assert files_of(run(data, folder, EVERYTHING)) == straight


PARAMS_YAML = """
train: {seed: 3, decoder: {embedding_size: 8, hidden_size: 12, attention_size: 8, dropout: 0.2, region_dropout: 0.1, word_dropout: 0.1},
  batch_size: 5, gradient_accumulation_steps: 2, optimizer: adamw, weight_decay: 0.01, ema_decay: 0.9, label_smoothing: 0.1,
  random_views: false, max_epochs: 14, lr: {peak: 0.01, warmup_steps: 2, schedule: cosine, step_epochs: 1,
  step_factor: 1.0}, scheduled_sampling: 0.2, precision: float32, compile: false, max_grad_norm: 5.0,
  doubly_stochastic_weight: 0.1, select_by: cider, patience: 99, max_length: 6}
"""


def stage(data: Path, out: Path, work: Path, text: str = PARAMS_YAML) -> list[str]:
    (data / "params.yaml").write_text(text)
    flags = {"params": data / "params.yaml", "tokens": data / "tokens", "features": data / "features"}
    flags |= {"out": out, "work": work, "live": work / "live"}
    flags |= {"dataset": data / "dataset", "encoder-weights": data / "encoder.pth"}
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


def test_params_that_change_while_the_stage_runs_are_not_taken_for_those_that_made_the_model(
    data: Path, tmp_path: Path
) -> None:
    command = stage(data, tmp_path / "out", tmp_path / "work")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while "epoch 3" not in process.stdout.readline():
            pass
        (data / "params.yaml").write_text(PARAMS_YAML.replace("seed: 3", "seed: 4"))
        process.stdout.read()
        told = process.stderr.read()
    assert process.returncode == 2
    assert "params.yaml: section 'train' was changed while this ran" in told
    assert not (tmp_path / "out").exists()
    (data / "params.yaml").write_text(PARAMS_YAML)
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "nothing to do" in again.stdout
    assert (tmp_path / "out").is_dir()


def test_what_is_missing_is_told_without_a_traceback(data: Path, tmp_path: Path) -> None:
    command = stage(data, tmp_path / "out", tmp_path / "work")
    command[command.index("--tokens") + 1] = str(tmp_path / "nowhere")
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert "nowhere/tokens.h5: No such file or directory; see that it exists and may be used" in found.stderr


def test_tokens_of_another_vocabulary_are_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / "tokens" / VOCABULARY_FILE
    words = read_vocabulary(path).words
    write_vocabulary(path, Vocabulary((*words[:4], *reversed(words[4:]))))
    with pytest.raises(UserError, match=r"tokens\.h5: its ids are of the vocabulary \w+, but vocabulary\.json beside"):
        run(tmp_path / "data", tmp_path / "run", params())


def test_a_finished_model_that_was_damaged_is_made_anew(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run(data, tmp_path / "run", params(max_epochs=1))
    whole = files_of(model)
    file = bytearray(whole[WEIGHTS_FILE])
    file[-1] ^= 1
    (model / WEIGHTS_FILE).write_bytes(file)
    assert files_of(run(data, tmp_path / "run", params(max_epochs=1))) == whole
    assert "the finished model is damaged and is made anew" in capsys.readouterr().out


def test_the_average_forgets_the_first_weights_of_a_short_run(data: Path, tmp_path: Path) -> None:
    runs = {
        average: run(data, tmp_path / str(average), params(ema_decay=average, max_epochs=6)) for average in (0.0, 0.999)
    }
    last, averaged = (json.loads((folder / "history.json").read_text())[-1]["val_loss"] for folder in runs.values())
    assert averaged < last + 0.1


def test_live_metrics_show_each_step_once_though_the_run_was_resumed(data: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save", lambda _: None)
        patch.setattr(Trainer, "_step", _stopping(5))
        with pytest.raises(_Killed):
            run(data, tmp_path / "run", EVERYTHING)
    run(data, tmp_path / "run", EVERYTHING)

    plots = tmp_path / "live" / "plots" / "metrics"
    loss = [line.split("\t") for line in (plots / "train" / "loss.tsv").read_text().splitlines()]
    assert loss[0] == ["step", "loss"]
    assert [int(step) for step, _ in loss[1:]] == list(range(1, 10))
    assert float(loss[-1][1]) < float(loss[1][1])
    assert [int(line.split()[0]) for line in (plots / "val_cider.tsv").read_text().splitlines()[1:]] == [3, 6, 9]
    told = {path.stem for path in (plots / "train").iterdir()}
    assert told >= {"learning_rate", "gradient_norm", "attention_entropy", "share_of_time_waiting"}
    metrics = json.loads((tmp_path / "live" / "metrics.json").read_text())
    assert 0 <= metrics["train"]["attention_entropy"] <= math.log(P)
    assert metrics["step"] == 9


def test_the_entropy_shown_is_that_of_attention_over_the_words_of_the_step(data: Path, tmp_path: Path) -> None:
    decoder = DecoderParams(
        embedding_size=8, hidden_size=12, attention_size=8, dropout=0.0, region_dropout=0.0, word_dropout=0.0
    )
    settings_of_run = params(decoder=decoder, max_epochs=1)
    tokens = data / "tokens"
    trainer = Trainer(
        params=settings_of_run,
        train=read_tokens(tokens / TOKENS_FILE, "train"),
        val=read_tokens(tokens / TOKENS_FILE, "val"),
        store=FeatureStore(data / "features"),
        vocabulary=read_vocabulary(tokens / VOCABULARY_FILE),
        folder=tmp_path,
        live=tmp_path / "unused",
        device=torch.device("cpu"),
    )
    batch = next(trainer._train.shuffled(settings_of_run.seed, 0))
    with torch.no_grad():
        _, attention = trainer.decoder(batch.grids, batch.tokens[:, :, :-1])
    weights = attention[batch.tokens[:, :, 1:] != PAD]  # of each word, over regions
    expected = -(weights * weights.log()).sum(dim=-1).mean().item()

    run(data, tmp_path / "run", settings_of_run, live_steps=2)

    told = (tmp_path / "live" / "plots" / "metrics" / "train" / "attention_entropy.tsv").read_text()
    rows = [line.split("\t") for line in told.splitlines()[1:]]
    assert [int(step) for step, _ in rows] == [1, 2, 4]
    assert float(rows[0][1]) == pytest.approx(expected, rel=1e-5)


def test_the_words_it_reads_are_more_and_more_its_own(data: Path, tmp_path: Path) -> None:
    read: list[float] = []
    mix = Trainer._read_words

    def watched(trainer: Trainer, grids: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        mixed = mix(trainer, grids, words)
        assert torch.equal(mixed[:, :, 0], words[:, :, 0])
        assert torch.equal(mixed == PAD, words == PAD)
        read.append((mixed != words).double().mean().item())
        return mixed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_read_words", watched)
        run(data, tmp_path / "run", params(scheduled_sampling=1.0, max_epochs=6))
    assert read[0] == 0
    assert sum(read[-5:]) > sum(read[:5])


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"warm_up": 4, "decay": "none"}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"warm_up": 0, "decay": "step", "step_epochs": 2}, [1, 1, 1, 1, 0.5, 0.5]),
        ({"warm_up": 0, "decay": "cosine"}, [1, 0.933013, 0.75, 0.5, 0.25, 0.066987]),
    ],
)
def test_the_learning_rate_runs_as_its_params_say(changes: dict[str, object], rates: list[float]) -> None:
    rising = schedule(peak=1.0, **changes)
    assert [rising.at(step, steps_an_epoch=2, max_epochs=3) for step in range(6)] == pytest.approx(rates, abs=1e-6)


def test_averaged_weights_are_kept_and_judged(data: Path, tmp_path: Path) -> None:
    plain = run(data, tmp_path / "plain", params(max_epochs=1))
    averaged = run(data, tmp_path / "averaged", params(max_epochs=1, ema_decay=0.5))
    weights = [load_file(folder / WEIGHTS_FILE) for folder in (plain, averaged)]
    assert weights[0].keys() == weights[1].keys()
    assert not torch.equal(weights[0]["key.weight"], weights[1]["key.weight"])
    torch.testing.assert_close(weights[0]["key.weight"], weights[1]["key.weight"], atol=0.1, rtol=0)


def test_two_processes_follow_one_and_resume_as_two(data: Path, tmp_path: Path) -> None:
    """Without dropout the losses agree to rounding; batches of 5 images make shares of 3 and 2."""
    text = PARAMS_YAML.replace("dropout: 0.2", "dropout: 0.0").replace("dropout: 0.1", "dropout: 0.0")
    text = text.replace("scheduled_sampling: 0.2", "scheduled_sampling: 0.0").replace("epochs: 14", "epochs: 8")

    def losses(folder: Path) -> list[float]:
        return [row["train_loss"] for row in json.loads((folder / "history.json").read_text())]

    one = stage(data, tmp_path / "one", tmp_path / "work-one", text)
    subprocess.run(one, check=True, capture_output=True)
    two = stage(data, tmp_path / "two", tmp_path / "work-two", text)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *two[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    straight = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert straight.returncode == 0, straight.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)

    again = [
        word.replace("work-two", "work-again").replace(str(tmp_path / "two"), str(tmp_path / "again"))
        for word in launch
    ]
    with subprocess.Popen(
        again, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        while "epoch 3" not in process.stdout.readline():
            pass
        for child in psutil.Process(process.pid).children():
            child.kill()
        process.stdout.read()
    resumed = subprocess.run(again, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("goes on from") == 1
    assert files_of(tmp_path / "again") == files_of(tmp_path / "two")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real photographs of ../shared/real are absent")
def test_twenty_real_photographs_can_be_learned_by_heart(tmp_path: Path) -> None:
    # One caption each: which of five to tell cannot be learned.
    with (REAL / "flickr" / "captions.txt").open(newline="") as file:
        first = {row["image"]: row["caption"] for row in reversed(list(csv.DictReader(file)))}
    records = [
        Record(image_id=number, file=name, split="train", captions=(first[name],))
        for number, name in enumerate(sorted(first)[:20])
    ]
    records += [replace(record, image_id=record.image_id + 20, split="val") for record in records[:4]]
    encoder = encode_params(REAL / "weights" / "resnet18-imagenet-to-layer3.pth", image_size=224)
    cpu = torch.device("cpu")
    encode(records, REAL / "flickr" / "images", encoder, tmp_path / "work", tmp_path / "features", cpu, 2)
    settings_of_words = TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_length=30)
    dataset = tokenize(records, settings_of_words, tmp_path)
    (tmp_path / "tokens").mkdir()
    write_vocabulary(tmp_path / "tokens" / VOCABULARY_FILE, dataset.vocabulary)
    write_tokens(tmp_path / "tokens" / TOKENS_FILE, dataset, settings_of_words, "0")
    decoder = DecoderParams(
        embedding_size=64, hidden_size=256, attention_size=64, dropout=0.0, region_dropout=0.0, word_dropout=0.0
    )
    rate = schedule(peak=4e-3, warmup_steps=10)
    by_heart = params(decoder=decoder, lr=rate, max_epochs=60, patience=60, doubly_stochastic_weight=0.0, max_length=20)

    folder = run(tmp_path, tmp_path / "run", by_heart)

    assert json.loads((folder / "history.json").read_text())[-1]["train_loss"] < 0.1


def test_it_learns_which_region_tells_the_color(data: Path, tmp_path: Path) -> None:
    decoder = DecoderParams(
        embedding_size=8, hidden_size=12, attention_size=8, dropout=0.0, region_dropout=0.0, word_dropout=0.0
    )
    settings_of_run = params(max_epochs=60, patience=99, doubly_stochastic_weight=0.0, decoder=decoder)
    folder = run(data, tmp_path / "run", settings_of_run)
    history = json.loads((folder / "history.json").read_text())
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert history[-1]["val_cider"] > 1
    assert read_model(folder).config.epoch >= 1


def test_training_stops_when_nothing_gets_better(data: Path, tmp_path: Path) -> None:
    folder = run(data, tmp_path / "run", params(max_epochs=50, patience=2, lr=schedule(peak=1e-9)))
    assert len(json.loads((folder / "history.json").read_text())) == 3


def test_the_last_epoch_is_kept_whatever_its_score_where_params_say_so(data: Path, tmp_path: Path) -> None:
    still = schedule(peak=1e-9)  # no epoch scores better than the first
    first = run(data, tmp_path / "first", params(max_epochs=4, patience=9, lr=still))
    last = run(data, tmp_path / "last", params(max_epochs=4, patience=1, lr=still, select_by="last"))
    assert [read_model(folder).config.epoch for folder in (first, last)] == [1, 4]
    cards = []
    for folder in (first, last):
        write_model_card(
            folder / CARD_FILE, read_model(folder).config, json.loads((folder / "history.json").read_text())
        )
        cards.append((folder / CARD_FILE).read_text())
    for told in ("epoch 1 of 4, selected by `cider`", "epoch was selected on these images"):
        assert told in cards[0]
    assert "epoch 4 of 4, the last one" in cards[1]
    assert "selected" not in cards[1]


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the loss is (nan|inf) in epoch \d+, step \d+ of the run, at a learning rate of"
    ):
        run(data, tmp_path / "run", params(lr=schedule(peak=1e30, warmup_steps=0), max_grad_norm=1e30))


def test_a_rate_that_ruins_the_weights_in_the_last_step_is_told_before_captions_are(data: Path, tmp_path: Path) -> None:
    rate = schedule(peak=1e30, warmup_steps=0)
    with pytest.raises(
        UserError, match=r"the loss in validation is (nan|inf) in epoch 1, step 1 of the run, at a lear"
    ):
        run(data, tmp_path / "run", params(lr=rate, batch_size=99, max_epochs=1))


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
        (CONFIG_FILE, '"weights_digest": "', '"weights_digest": "f', r"decoder\.safetensors: its bytes are not those"),
        (CONFIG_FILE, '"image_size": ', '"image_size": 1', r"config\.json: its encoder has fingerprint"),
        (CONFIG_FILE, '"schema_version": 4', '"schema_version": 3', r"config\.json: has schema gridcap\.model 3"),
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
    with pytest.raises(UserError, match=r"decoder\.safetensors: its bytes are not those"):
        read_model(tmp_path)
