"""Checkpoints: restored bit for bit, and rejected when damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import UserError
from pipeline.training.checkpoint import (
    SCHEMA,
    Progress,
    TrainingState,
    load_checkpoint,
    random_state,
    save_checkpoint,
)
from pipeline.training.ema import make_ema

CPU = torch.device("cpu")


def make_state(ema_decay: float = 0.9) -> TrainingState:
    decoder = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.1, fused=True)
    return TrainingState(decoder=decoder, optimizer=optimizer, ema=make_ema(decoder, ema_decay))


def step(state: TrainingState) -> None:
    state.optimizer.zero_grad()
    state.decoder(torch.rand(4, 3)).square().sum().backward()
    state.optimizer.step()
    if state.ema is not None:
        state.ema.update_parameters(state.decoder)


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(tensor, value) for (name, tensor), (other, value) in pairs)


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, TrainingState]:
    torch.manual_seed(1)
    state = make_state()
    step(state)
    state.progress = Progress(epoch=2, batch=1, loss_sum=3.5, num_words=7, history=[{"val_cider": 0.1}], best_epoch=1)
    state.best_weights = {"weight": torch.rand(2, 3), "bias": torch.rand(2)}
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, state, [random_state(CPU)])
    return path, state


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_restored_run_continues_bit_for_bit(tmp_path: Path, ema_decay: float) -> None:
    torch.manual_seed(1)
    state = make_state(ema_decay)
    step(state)
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, state, [random_state(CPU)])
    step(state)  # also draws random inputs

    torch.manual_seed(2)
    restored = make_state(ema_decay)
    load_checkpoint(path, restored, rank=0)
    step(restored)

    assert same_tensors(restored.decoder, state.decoder)
    if state.ema is not None:
        assert restored.ema is not None
        assert same_tensors(restored.ema, state.ema)


def test_progress_and_best_weights_are_restored(checkpoint: tuple[Path, TrainingState]) -> None:
    path, state = checkpoint
    restored = make_state()
    load_checkpoint(path, restored, rank=0)
    assert restored.progress == state.progress
    assert restored.best_weights.keys() == state.best_weights.keys()
    assert torch.equal(restored.best_weights["weight"], state.best_weights["weight"])


def test_every_rank_gets_its_random_state(tmp_path: Path) -> None:
    states, draws = [], []
    for seed in (5, 6):
        torch.manual_seed(seed)
        states.append(random_state(CPU))
        draws.append(torch.rand(3))
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, make_state(), states)
    for rank in (0, 1):
        load_checkpoint(path, make_state(), rank)
        assert torch.equal(torch.rand(3), draws[rank])


def test_a_file_that_is_no_checkpoint_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    for content in (b"", b"half a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_checkpoint(path, make_state(), rank=0)
        assert str(path) in str(caught.value)


def test_an_altered_checkpoint_is_rejected_and_changes_nothing(checkpoint: tuple[Path, TrainingState]) -> None:
    path, _ = checkpoint
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    state = make_state()
    weight = state.decoder.weight.clone()
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, state, rank=0)
    assert str(path) in str(caught.value)
    assert "digest" in str(caught.value)
    assert torch.equal(state.decoder.weight, weight)


@pytest.mark.slow
def test_every_altered_byte_is_noticed(checkpoint: tuple[Path, TrainingState]) -> None:
    path, state = checkpoint
    save_checkpoint(path, state, [{"cpu": torch.zeros(8, dtype=torch.uint8)}])  # a real random state has 5 kB
    content = path.read_bytes()
    for index in range(len(content)):
        for bit in (0, 5):  # 5 is the case of a letter
            altered = bytearray(content)
            altered[index] ^= 1 << bit
            path.write_bytes(altered)
            with pytest.raises(UserError) as caught:
                load_checkpoint(path, make_state(), rank=0)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)


def with_another_decoder(path: Path) -> None:
    decoder = nn.Linear(3, 4)
    other = TrainingState(decoder=decoder, optimizer=torch.optim.Adam(decoder.parameters()), ema=None)
    save_checkpoint(path, other, [random_state(CPU)])


def with_another_optimizer_state(path: Path) -> None:
    state = make_state()
    step(state)
    state.optimizer.state[state.decoder.bias]["exp_avg"] = torch.zeros(5)
    save_checkpoint(path, state, [random_state(CPU)])


def with_other_best_weights(path: Path) -> None:
    state = make_state()
    state.best_weights = {"weight": torch.rand(7, 3)}
    save_checkpoint(path, state, [random_state(CPU)])


def without_ema(path: Path) -> None:
    save_checkpoint(path, make_state(ema_decay=0.0), [random_state(CPU)])


def without_random_states(path: Path) -> None:
    save_checkpoint(path, make_state(), [])


def with_a_short_random_state(path: Path) -> None:
    save_checkpoint(path, make_state(), [{"cpu": torch.zeros(8, dtype=torch.uint8)}])


def with_progress_that_is_not_finite(path: Path) -> None:
    state = make_state()
    state.progress.loss_sum = float("nan")
    save_checkpoint(path, state, [random_state(CPU)])


@pytest.mark.parametrize(
    ("write", "fault"),
    [
        (with_another_decoder, "size mismatch for weight"),
        (with_another_optimizer_state, r"optimizer\.1\.exp_avg has another shape"),
        (with_other_best_weights, "the best epoch have other shapes"),
        (without_ema, "Missing key"),
        (without_random_states, "no random state of process 0"),
        (with_a_short_random_state, "RNG state"),
        (with_progress_that_is_not_finite, "loss_sum"),
    ],
)
def test_a_checkpoint_of_another_run_is_one_sentence(tmp_path: Path, write: Callable[[Path], None], fault: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    write(path)
    with pytest.raises(UserError, match=rf"checkpoint\.safetensors: .*{fault}.* Delete it") as caught:
        load_checkpoint(path, make_state(), rank=0)
    assert "\n" not in str(caught.value)


def test_another_schema_version_is_rejected(checkpoint: tuple[Path, TrainingState]) -> None:
    path, _ = checkpoint
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"schema_version": str(SCHEMA.version + 1)}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert json.loads(metadata["progress"])["epoch"] == 2
    save_file(tensors, path, metadata)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, make_state(), rank=0)
    assert f"version {SCHEMA.version + 1}" in str(caught.value)
