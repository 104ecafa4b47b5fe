"""Training on a small dataset: it learns, selects an epoch, and resumes from any step to the same bytes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.captions.vocabulary import PAD
from pipeline.decoder.decoder import DecoderKind
from pipeline.decoder.model_io import WEIGHTS_FILE, read_model
from pipeline.errors import UserError
from pipeline.training.train import CHECKPOINT_FILE
from tests.factories import decoder_params, lr_params, train_params
from tests.kinds import all_kinds_exhaustively
from tests.tiny_dataset import EVERY_FEATURE, make_trainer, read_files, take_steps, train_tiny

TINY_LR = lr_params(peak=1e-9)
"""Too small a learning rate for any epoch to score better than the first."""


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of an uninterrupted run."""
    return train_tiny(data, tmp_path_factory.mktemp("uninterrupted") / "run", EVERY_FEATURE)


def read_history(model: Path) -> list[dict[str, float]]:
    history: list[dict[str, float]] = json.loads((model / "history.json").read_text())
    return history


@pytest.mark.slow
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(min_value=1, max_value=12), min_size=1, max_size=2))
def test_a_run_stopped_after_any_steps_resumes_to_the_same_bytes(
    data: Path, uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory, stops: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    folder.mkdir()
    for stop in stops:
        take_steps(make_trainer(data, folder, EVERY_FEATURE), stop)
        torch.manual_seed(999)
    assert read_files(train_tiny(data, folder, EVERY_FEATURE)) == read_files(uninterrupted)


@pytest.mark.slow
@all_kinds_exhaustively
def test_a_run_stopped_after_every_step_resumes_to_the_same_bytes(
    data: Path, tmp_path: Path, kind: DecoderKind
) -> None:
    dropout = {"dropout": 0.2, "region_dropout": 0.1, "word_dropout": 0.1}
    params = replace(EVERY_FEATURE, decoder=decoder_params(kind=kind, **dropout))
    (tmp_path / "0").mkdir()
    expected = read_files(train_tiny(data, tmp_path / "0" / "run", params))
    for stop in range(1, 3 * params.max_epochs):
        folder = tmp_path / str(stop) / "run"
        folder.mkdir(parents=True)
        take_steps(make_trainer(data, folder, params), stop)
        torch.manual_seed(999)
        trainer = make_trainer(data, folder, params)
        assert trainer.is_resumed
        assert trainer.global_step == stop
        assert read_files(train_tiny(data, folder, params)) == expected


@pytest.mark.slow
def test_a_second_run_gives_the_same_bytes(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    assert read_files(train_tiny(data, tmp_path / "run", EVERY_FEATURE)) == read_files(uninterrupted)


def test_metrics_of_a_step_are_those_of_its_batches(data: Path, tmp_path: Path) -> None:
    params = train_params(decoder=decoder_params(), gradient_accumulation_steps=2, max_grad_norm=1e-3)
    trainer = make_trainer(data, tmp_path, params)
    batches = list(trainer._train_batches.shuffled(params.seed, 0))[:2]
    cross_entropy, entropy, num_words = 0.0, 0.0, 0
    for batch in batches:
        targets = batch.tokens[:, :, 1:]
        with torch.no_grad():
            logits, alpha = trainer.decoder(batch.grids, batch.tokens[:, :, :-1])
        words = targets != PAD
        cross_entropy -= logits.log_softmax(dim=-1).gather(3, targets.unsqueeze(-1)).squeeze(-1)[words].sum().item()
        entropy -= (alpha[words] * alpha[words].log()).sum().item()
        num_words += int(words.sum())

    next(trainer.train_epoch(lambda step: step == 1))
    (metrics,) = trainer.read_metrics()

    assert metrics.loss == pytest.approx(cross_entropy / num_words, rel=1e-5)
    assert metrics.attention_entropy == pytest.approx(entropy / num_words, rel=1e-5)
    assert (metrics.step, metrics.num_batches) == (1, 2)
    assert metrics.num_captions == sum(int((batch.tokens != PAD).any(dim=2).sum()) for batch in batches)
    assert metrics.gradient_norm > params.max_grad_norm  # the norm before clipping
    assert metrics.learning_rate == params.lr.lr_at(0, 3, params.max_epochs)


def test_accumulated_batches_train_like_one_large_batch(data: Path, tmp_path: Path) -> None:
    gradients = []
    for batch_size, accumulation_steps in ((24, 1), (7, 4)):
        params = train_params(
            decoder=decoder_params(),
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation_steps,
        )
        trainer = make_trainer(data, tmp_path, params)
        assert list(trainer.train_epoch(lambda _: False)) == [1]
        (metrics,) = trainer.read_metrics()
        assert metrics.num_batches == accumulation_steps
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.decoder.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_captions_padded_for_cuda_graphs_have_the_same_gradients(data: Path, tmp_path: Path) -> None:
    """For CUDA graphs, captions are padded to a multiple of steps, and gradients stay in place."""
    gradients = []
    for replays in (False, True):
        trainer = make_trainer(data, tmp_path, train_params(decoder=decoder_params(), batch_size=24))
        trainer._replays = replays
        batches = trainer._train_batches
        (batch,) = trainer._make_train_batches(batches._captions, batches._store, 24, False).shuffled(1, 0)
        assert batch.tokens.shape[2] - 1 == (8 if replays else 5)
        trainer.train_step([batch])
        first = next(trainer.decoder.parameters()).grad
        trainer.train_step([batch])
        assert (next(trainer.decoder.parameters()).grad is first) == replays
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.decoder.parameters()]))
        assert len(trainer.read_metrics()) == 2
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_scheduled_sampling_increases_over_the_run(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, train_params(scheduled_sampling=1.0, max_epochs=4))
    batch = next(trainer._train_batches.by_length())
    tokens = batch.tokens[:, :, :-1]

    def replaced() -> float:
        return (trainer._sample_inputs(batch.grids, tokens) != tokens).double().mean().item()

    rates = []
    for trainer.progress.epoch in range(4):
        torch.manual_seed(1)
        rates.append(replaced())
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[3] > 0.3


@pytest.mark.slow
def test_the_ema_is_kept_and_validated(data: Path, tmp_path: Path) -> None:
    last = train_tiny(data, tmp_path / "last", train_params(max_epochs=1))
    averaged = train_tiny(data, tmp_path / "averaged", train_params(max_epochs=1, ema_decay=0.5))
    weights = [load_file(folder / WEIGHTS_FILE) for folder in (last, averaged)]
    assert weights[0].keys() == weights[1].keys()
    differences = [(tensor - weights[1][name]).abs().max().item() for name, tensor in weights[0].items()]
    assert 0 < max(differences) < 0.1
    assert read_history(last)[0]["train_loss"] == read_history(averaged)[0]["train_loss"]
    assert read_history(last)[0]["val_loss"] != read_history(averaged)[0]["val_loss"]


@pytest.mark.slow
def test_the_ema_of_a_short_run_forgets_the_initial_weights(data: Path, tmp_path: Path) -> None:
    last, averaged = (
        read_history(train_tiny(data, tmp_path / str(decay), train_params(ema_decay=decay, max_epochs=6)))[-1]
        for decay in (0.0, 0.999)
    )
    assert averaged["val_loss"] < last["val_loss"] + 0.1


@pytest.mark.slow
@all_kinds_exhaustively
def test_it_learns_which_region_shows_the_color(data: Path, tmp_path: Path, kind: DecoderKind) -> None:
    params = train_params(max_epochs=60, patience=99, doubly_stochastic_weight=0.0, decoder=decoder_params(kind=kind))
    model = train_tiny(data, tmp_path / "run", params)
    history = read_history(model)
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert history[-1]["val_cider"] > 1
    best = max(row["val_cider"] for row in history)
    assert history[read_model(model).config.epoch - 1]["val_cider"] == best


@pytest.mark.slow
def test_training_stops_early_without_improvement(data: Path, tmp_path: Path) -> None:
    model = train_tiny(data, tmp_path / "run", train_params(max_epochs=50, patience=2, lr=TINY_LR))
    assert len(read_history(model)) == 3
    assert read_model(model).config.epoch == 1


@pytest.mark.slow
def test_select_by_last_keeps_the_last_epoch(data: Path, tmp_path: Path) -> None:
    params = train_params(max_epochs=4, patience=1, lr=TINY_LR, select_by="last")
    config = read_model(train_tiny(data, tmp_path / "run", params)).config
    assert (config.epoch, config.selected_by) == (4, "last")


def test_a_loss_that_is_not_finite_names_epoch_and_step(data: Path, tmp_path: Path) -> None:
    params = train_params(lr=lr_params(peak=1e30, warmup_steps=0), max_grad_norm=1e30)
    with pytest.raises(UserError) as caught:
        train_tiny(data, tmp_path / "run", params)
    message = str(caught.value)
    assert "nan" in message or "inf" in message
    assert "epoch 1, step 2" in message
    assert "9.89e+29" in message  # the learning rate of the step
    assert "train.lr.peak" in message


def test_a_validation_loss_that_is_not_finite_is_reported(data: Path, tmp_path: Path) -> None:
    """The only step makes the weights overflow after its loss was computed."""
    params = train_params(lr=lr_params(peak=1e30, warmup_steps=0), batch_size=99, max_epochs=1)
    with pytest.raises(UserError) as caught:
        train_tiny(data, tmp_path / "run", params)
    message = str(caught.value)
    assert "validation loss" in message
    assert "epoch 1, step 1" in message


def test_a_damaged_checkpoint_is_rejected(data: Path, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(b"half a checkpoint")
    with pytest.raises(UserError) as caught:
        make_trainer(data, tmp_path, train_params())
    assert str(path) in str(caught.value)


def test_entropy_of_a_step_is_at_most_that_of_uniform_attention(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, train_params())
    assert list(trainer.train_epoch(lambda step: step % 2 == 0)) == [1, 2, 3, 4, 5]
    entropies = [metrics.attention_entropy for metrics in trainer.read_metrics()]
    assert entropies[::2] == [None] * 3
    assert all(entropy is not None and 0 <= entropy <= math.log(4) for entropy in entropies[1::2])
