"""Captions without images: regression, pseudo-regions, joint training, and resuming across the two phases."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.captions.tokens import TOKENS_FILE, CaptionTokens, read_tokens
from pipeline.captions.vocabulary import PAD, SPECIALS, VOCABULARY_FILE, read_vocabulary
from pipeline.decoder.decoder import DecoderKind
from pipeline.features.store import FeatureStore
from pipeline.training.batches import CaptionBatches
from pipeline.training.text_pretraining import GridRegression, JointTrainer, PseudoGrids, Text, TextPretrainer
from pipeline.training.train import CHECKPOINT_FILE, TEXT_CHECKPOINT_FILE
from pipeline.training.trainer import Targets, TextPretrainingParams, Trainer, TrainParams
from tests.factories import decoder_params, train_params
from tests.kinds import P, all_kinds, all_kinds_exhaustively, example_batch, small_decoder
from tests.tiny_dataset import (
    CHANNELS,
    COLORS,
    EVERY_FEATURE,
    NUM_REGIONS,
    TEXT,
    make_text_trainer,
    make_trainer,
    read_files,
    take_steps,
    train_tiny,
)

PRETRAINING = TextPretrainingParams(max_epochs=2, joint_weight=0.5, num_regions=3, ridge_penalty=1.0, noise=0.1)


def inputs_of(data: Path) -> tuple[CaptionTokens, CaptionTokens, FeatureStore, int]:
    tokens = data / "tokens" / TOKENS_FILE
    vocabulary = read_vocabulary(data / "tokens" / VOCABULARY_FILE)
    return read_tokens(tokens, "text"), read_tokens(tokens, "train"), FeatureStore(data / "features"), len(vocabulary)


def bags(captions: CaptionTokens, vocab_size: int) -> np.ndarray:
    """Return which words each caption has [N, V]."""
    rows = np.zeros((len(captions.image_id), vocab_size))
    for row, ids in zip(rows, captions.padded(range(len(captions.image_id))), strict=True):
        row[ids[ids >= len(SPECIALS)]] = 1
    return rows


def test_the_regression_is_the_direct_solution(data_with_text: Path) -> None:
    text, train, store, vocab_size = inputs_of(data_with_text)
    penalty = 0.7
    grids = torch.from_numpy(store.grids(train.image_id.tolist())).double()
    means = F.layer_norm(grids, grids.shape[2:]).mean(dim=1).numpy()
    words = bags(train, vocab_size)
    # Ridge regression with an intercept is least squares with a row of penalty for each word.
    design = np.block(
        [[np.ones((len(words), 1)), words], [np.zeros((vocab_size, 1)), penalty**0.5 * np.eye(vocab_size)]]
    )
    solution, *_ = np.linalg.lstsq(design, np.vstack([means, np.zeros((vocab_size, CHANNELS))]), rcond=None)
    regression = GridRegression.fit(train, store, vocab_size, penalty)
    for captions in (train, text):
        count = len(captions.image_id)
        expected = np.hstack([np.ones((count, 1)), bags(captions, vocab_size)]) @ solution
        np.testing.assert_allclose(regression.predict(captions, range(count)), expected, atol=1e-5)


@pytest.mark.parametrize("num_regions", [1, 3, NUM_REGIONS, 99])
def test_pseudo_regions_are_those_of_an_image_shifted_by_the_predictions(
    data_with_text: Path, num_regions: int
) -> None:
    text, train, store, vocab_size = inputs_of(data_with_text)
    regression = GridRegression.fit(train, store, vocab_size, 1.0)
    params = replace(PRETRAINING, num_regions=num_regions, noise=0.0)
    source = PseudoGrids(text, train, store, regression, params, 1)
    pseudo = torch.from_numpy(source.grids([5, 2, 5], [7, 7, 8])).double()
    assert pseudo.shape == (3, min(num_regions, NUM_REGIONS), CHANNELS)
    grids = torch.from_numpy(store.grids(train.image_id.tolist())).double()
    residuals = F.layer_norm(grids, grids.shape[2:]).mean(dim=1) - regression.predict(train, range(len(train.image_id)))
    actual = pseudo.mean(dim=1) - regression.predict(text, [5, 2, 5])  # [3, C]
    distances = (actual.unsqueeze(1) - residuals).abs().amax(dim=2)  # [3, N]
    assert (distances.amin(dim=1) < 2e-2).all()  # each is the residual of a train caption, up to float16
    assert not torch.equal(pseudo[0], pseudo[2])


def test_a_pseudo_grid_depends_on_caption_and_draw_alone(data_with_text: Path) -> None:
    text, train, store, vocab_size = inputs_of(data_with_text)
    regression = GridRegression.fit(train, store, vocab_size, 1.0)
    source = PseudoGrids(text, train, store, regression, PRETRAINING, 1)
    together = source.grids([5, 2, 9], [7, 1, 3])
    alone = [source.grids([caption], [draw]) for caption, draw in ((5, 7), (2, 1), (9, 3))]
    np.testing.assert_array_equal(together, np.concatenate(alone))

    def by_caption(batch_size: int, epoch: int, rank: int = 0, world_size: int = 1) -> dict[int, bytes]:
        batches = CaptionBatches(text, source, batch_size, random_views=True)
        shuffled = batches.shuffled(3, epoch, rank=rank, world_size=world_size)
        return {
            image_id: grid.numpy().tobytes()
            for batch in shuffled
            for image_id, grid in zip(batch.image_ids, batch.grids, strict=True)
        }

    first = by_caption(5, 0)
    assert len(first) == len(text.captions)
    assert first == by_caption(5, 0, 0, 2) | by_caption(5, 0, 1, 2)
    second = by_caption(5, 1)
    assert all(first[caption] != second[caption] for caption in first)


@all_kinds
def test_regions_of_another_number_have_the_mean_position(kind: DecoderKind) -> None:
    decoder = small_decoder(kind).eval()
    grids, tokens = example_batch()
    equal = grids[:, :1].expand(-1, P, -1)
    assert torch.equal(
        decoder._encode_regions(grids[:, :1]).mean(dim=1)[:, -16:], decoder.position_encoding.mean(0).expand(3, -1)
    )
    torch.testing.assert_close(decoder._encode_regions(grids[:, :1])[:, 0], decoder._encode_regions(equal).mean(dim=1))
    logits, alpha = decoder(grids[:, :4], tokens)
    assert alpha.shape[-1] == 4
    assert torch.isfinite(logits).all()


def make_text_pretrainer(data: Path, folder: Path, params: TrainParams) -> TextPretrainer:
    return make_text_trainer(TextPretrainer, data, folder / TEXT_CHECKPOINT_FILE, params)


@all_kinds
def test_a_joint_step_has_the_gradients_of_images_and_of_text(
    data_with_text: Path, tmp_path: Path, kind: DecoderKind
) -> None:
    params = train_params(
        decoder=decoder_params(kind=kind), text_pretraining=PRETRAINING, gradient_accumulation_steps=2, max_epochs=9
    )
    joint = make_text_trainer(JointTrainer, data_with_text, tmp_path / CHECKPOINT_FILE, params)
    images = make_trainer(data_with_text, tmp_path, params)
    images.decoder.load_state_dict(joint.decoder.state_dict())
    text, train, store, vocab_size = inputs_of(data_with_text)
    source = Text.fit(text, train, store, vocab_size, params).grids
    captions_per_image = len(train.image_id) / len(train.first_of_image)
    text_batches = CaptionBatches(text, source, round(5 * captions_per_image), random_views=True)
    # Text continues after the epochs of pretraining, and begins again where it ends.
    expected_text = [*text_batches.shuffled(3, 2), *text_batches.shuffled(3, 3)]
    batches = list(joint._train_batches.shuffled(1, 0))
    assert len(text_batches) % 2
    for start in range(0, len(text_batches) + 1, 2):
        step = batches[start % 4 : start % 4 + 2]
        for trainer in (images, joint):
            trainer.decoder.zero_grad()
            tokens = [batch.tokens for batch in step]
            targets = [Targets(tokens=ids) for ids in tokens]
            trainer._accumulate_gradients(step, targets, trainer._count(tokens), False)
        losses = []
        for batch in expected_text[start : start + 2]:
            logits, _ = images.decoder(batch.grids, batch.tokens[:, :, :-1])
            ids = batch.tokens[:, :, 1:]
            losses.append(F.cross_entropy(logits.flatten(0, 2), ids.flatten(), ignore_index=PAD, reduction="none"))
        words = torch.cat(losses)
        (PRETRAINING.joint_weight * words.sum() / (words > 0).sum()).backward()
        for expected, actual in zip(images.decoder.parameters(), joint.decoder.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad, atol=1e-6, rtol=1e-4)


def new_run(folder: Path) -> Path:
    """Make the folder of a run. The model records its name."""
    (folder / "run").mkdir(parents=True)
    return folder / "run"


class StopError(Exception):
    """The run was stopped."""


@pytest.mark.slow
@all_kinds_exhaustively
def test_a_run_stopped_after_every_step_of_both_phases_resumes_to_the_same_bytes(
    data_with_text: Path, tmp_path: Path, kind: DecoderKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropout = {"dropout": 0.2, "region_dropout": 0.1, "word_dropout": 0.1}
    params = replace(EVERY_FEATURE, decoder=decoder_params(kind=kind, **dropout), max_epochs=2)
    expected = read_files(train_tiny(data_with_text, new_run(tmp_path / "0"), params))
    assert not (tmp_path / "0" / "run" / TEXT_CHECKPOINT_FILE).exists()
    train_step = Trainer.train_step
    steps = 0
    stop = 10**9

    def stopping_step(self: Trainer, *args: object, **kwargs: object) -> object:
        nonlocal steps
        if steps == stop:
            self.save_checkpoint()
            raise StopError
        steps += 1
        return train_step(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "train_step", stopping_step)
    stopped_in = []
    for stop in range(1, 99):
        folder, steps = new_run(tmp_path / str(stop)), 0
        try:
            train_tiny(data_with_text, folder, params)
        except StopError:
            stopped_in.append((folder / CHECKPOINT_FILE).exists())
            steps = stop + 1
        else:
            break
        torch.manual_seed(999)
        assert read_files(train_tiny(data_with_text, folder, params)) == expected
    assert set(stopped_in) == {False, True}


@pytest.mark.slow
def test_a_run_killed_between_the_phases_resumes_to_the_same_bytes(data_with_text: Path, tmp_path: Path) -> None:
    params = train_params(max_epochs=1, text_pretraining=PRETRAINING)
    expected = read_files(train_tiny(data_with_text, new_run(tmp_path / "0"), params))
    folder = new_run(tmp_path / "1")
    pretrainer = make_text_pretrainer(data_with_text, folder, params)
    take_steps(pretrainer, 10**9)
    weights = {name: weight.clone() for name, weight in pretrainer.eval_model.state_dict().items()}
    resumed = make_text_pretrainer(data_with_text, folder, params)
    assert resumed.is_finished
    for name, weight in resumed.eval_model.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert read_files(train_tiny(data_with_text, folder, params)) == expected


@pytest.mark.slow
def test_without_pretraining_the_text_is_not_used(data: Path, data_with_text: Path, tmp_path: Path) -> None:
    params = train_params(max_epochs=1, text_pretraining=PRETRAINING)
    off, null = (
        train_tiny(data, new_run(tmp_path / name), replace(params, text_pretraining=pretraining))
        for name, pretraining in (("off", PRETRAINING), ("off null", None))
    )
    assert read_files(off) == read_files(null)
    assert not list((tmp_path / "off").rglob("*text*"))
    assert json.loads((off / "config.json").read_text())["data"]["num_text_captions"] == 0
    on = train_tiny(data_with_text, tmp_path / "on", params)
    assert json.loads((on / "config.json").read_text())["data"]["num_text_captions"] == len(TEXT) - len(COLORS)
    # The others are captions of val.
    null = train_tiny(data_with_text, tmp_path / "on null", replace(params, text_pretraining=None))
    assert read_files(on)["decoder.safetensors"] != read_files(null)["decoder.safetensors"]
    assert json.loads((null / "config.json").read_text())["data"]["num_text_captions"] == 0


@pytest.mark.slow
@all_kinds_exhaustively
def test_pretraining_learns_words_that_no_image_has(data_with_text: Path, tmp_path: Path, kind: DecoderKind) -> None:
    """The regression connects a color with a channel, so a decoder that saw only text names the color of an image."""
    pretraining = replace(PRETRAINING, max_epochs=60, num_regions=1, noise=0.0, ridge_penalty=0.1)
    params = train_params(decoder=decoder_params(kind=kind), text_pretraining=pretraining, batch_size=2)
    pretrainer = make_text_pretrainer(data_with_text, tmp_path, params)
    first = None
    while not pretrainer.is_finished:
        for _ in pretrainer.train_epoch(lambda _: False):
            pass
        pretrainer.end_epoch()
        first = first or pretrainer.progress.history[0]
    last = pretrainer.progress.history[-1]
    assert last["train_loss"] < first["train_loss"] / 2
    result = pretrainer._validate()
    references = pretrainer._val_references
    right = [set(COLORS) & {*result.captions[image]} == set(COLORS) & {*references[image][0]} for image in references]
    assert sum(right) > len(right) / 2
