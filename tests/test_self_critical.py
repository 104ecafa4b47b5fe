"""Self-critical training on a small dataset, compared with an obvious implementation."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from pipeline.captions.records import Record
from pipeline.captions.tokens import TOKENS_FILE, group_references, read_tokens
from pipeline.captions.vocabulary import END, PAD, START, UNK
from pipeline.decoder import products
from pipeline.decoder.decoder import DecoderKind
from pipeline.decoder.model_io import TrainedModel, read_model
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.training.batches import Batch
from pipeline.training.self_critical import RefineParams, SelfCriticalTrainer
from pipeline.training.train import CHECKPOINT_FILE
from tests.factories import decoder_params, lr_params, refine_params, train_params
from tests.kinds import all_kinds_exhaustively
from tests.tiny_dataset import CPU, take_steps, train_tiny, write_token_files

END_WORD = "<end>"


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """Train a model of which many samples are wrong."""
    params = train_params(max_epochs=4)
    return read_model(train_tiny(data, tmp_path_factory.mktemp("trained") / "run", params))


def make_refiner(
    data: Path, folder: Path, model: TrainedModel, params: RefineParams, device: torch.device = CPU
) -> SelfCriticalTrainer:
    """Make the trainer of a run whose checkpoint is in `folder`."""
    tokens = data / "tokens" / TOKENS_FILE
    return SelfCriticalTrainer(
        params=params,
        model=model,
        train=read_tokens(tokens, "train"),
        val=read_tokens(tokens, "val"),
        store=FeatureStore(data / "features"),
        checkpoint=folder / CHECKPOINT_FILE,
        device=device,
    )


def first_batch(trainer: SelfCriticalTrainer) -> Batch:
    return next(trainer._train_batches.shuffled(trainer.params.seed, 0))


def plain_ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def plain_cider_d(
    words: Sequence[str], references: Sequence[Sequence[str]], corpus: Sequence[Sequence[Sequence[str]]]
) -> float:
    """Compute CIDEr-D of one caption, with the document frequencies of a corpus."""
    frequency = Counter(ngram for image in corpus for ngram in set().union(*map(plain_ngrams, image)))

    def vector(caption: Sequence[str], n: int) -> dict[tuple[str, ...], float]:
        return {
            ngram: count * math.log(len(corpus) / max(1, frequency[ngram]))
            for ngram, count in plain_ngrams(caption).items()
            if len(ngram) == n
        }

    score = 0.0
    for reference in references:
        for n in range(1, 5):
            a, b = vector(words, n), vector(reference, n)
            norms = math.hypot(*a.values()) * math.hypot(*b.values())
            product = sum(min(weight, b[ngram]) * b[ngram] for ngram, weight in a.items() if ngram in b)
            penalty = math.exp(-((len(words) - len(reference)) ** 2) / 72)
            score += 10 * penalty * (product / norms if norms else 0.0) / 4 / len(references)
    return score


def corpus_of(data: Path) -> dict[int, list[list[str]]]:
    captions = group_references(read_tokens(data / "tokens" / TOKENS_FILE, "train"))
    return {image_id: [[*words, END_WORD] for words in image] for image_id, image in captions.items()}


def log_prob(trainer: SelfCriticalTrainer, grid: Tensor, ids: Sequence[int], forbidden: Sequence[int]) -> Tensor:
    """Compute the log-probability of one caption, word by word."""
    logits, _ = trainer.decoder(grid.unsqueeze(0), torch.tensor([[ids[:-1]]]))
    logits = logits.index_fill(3, torch.tensor(forbidden, dtype=torch.int64), -torch.inf)
    log_probs = logits[0, 0].log_softmax(dim=-1)
    return torch.stack([log_probs[step, token] for step, token in enumerate(ids[1:])]).sum()


def gradient(trainer: SelfCriticalTrainer) -> Tensor:
    return torch.cat(
        [parameter.grad.flatten() for parameter in trainer.decoder.parameters() if parameter.grad is not None]
    )


def captions_in(tokens: Tensor) -> list[list[int]]:
    """Return the ids of captions [K, T + 1] without padding."""
    return [[token for token in row if token != PAD] for row in tokens.tolist() if row[1] != PAD]


def take_step(trainer: SelfCriticalTrainer, batch: Batch) -> tuple[list[list[list[int]]], Tensor]:
    """Take a step on a batch, and return the sampled captions of each image and the gradient, without clipping."""
    (samples,), _ = trainer._select_targets([batch])
    trainer.train_step([batch])
    num_samples = trainer._refine.num_samples
    return [captions_in(image[:num_samples]) for image in samples.tokens], gradient(trainer)


@pytest.mark.parametrize("baseline", ["mean", "greedy"])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("bleu4_weight", [0.0, 2.0])
def test_the_gradient_is_that_of_the_definition(
    data: Path, tmp_path: Path, model: TrainedModel, baseline: str, share: float, bleu4_weight: float
) -> None:
    params = refine_params(
        baseline=baseline, cross_entropy_weight=share, bleu4_weight=bleu4_weight, max_grad_norm=1e9, num_samples=4
    )
    trainer = make_refiner(data, tmp_path, model, params)
    trainer.decoder.double()
    batch = first_batch(trainer)
    weights = {name: value.clone() for name, value in trainer.decoder.state_dict().items()}
    samples, actual = take_step(trainer, batch)
    trainer.decoder.load_state_dict(weights)
    trainer.decoder.zero_grad()

    corpus, words = corpus_of(data), model.vocabulary.words

    def reward(image_id: int, ids: Sequence[int]) -> float:
        caption = [words[token] for token in ids[1:]]
        score = plain_cider_d(caption, corpus[image_id], list(corpus.values()))
        return score + bleu4_weight * plain_bleu4(caption, corpus[image_id])

    loss, num_words = torch.zeros((), dtype=torch.float64), 0
    cross_entropy, num_reference_words = torch.zeros((), dtype=torch.float64), 0
    for image_id, grid, references, captions in zip(batch.image_ids, batch.grids, batch.tokens, samples, strict=True):
        rewards = [reward(image_id, ids) for ids in captions]
        assert len(captions) == 4
        greedy = reward(image_id, greedy_caption(trainer, grid, params.max_length))
        for index, ids in enumerate(captions):
            others = rewards[:index] + rewards[index + 1 :]
            compared = sum(others) / len(others) if baseline == "mean" else greedy
            loss = loss - (rewards[index] - compared) * log_prob(trainer, grid, ids, [PAD, START, UNK])
            num_words += len(ids) - 1
        for ids in captions_in(references):
            cross_entropy = cross_entropy - log_prob(trainer, grid, ids, [])
            num_reference_words += len(ids) - 1
    ((1 - share) * loss / num_words + share * cross_entropy / num_reference_words).backward()
    expected = gradient(trainer)
    assert expected.abs().max() > 1e-3
    # The library's BLEU adds small constants, as coco-caption does.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-5 if bleu4_weight else 1e-11)


def greedy_caption(trainer: SelfCriticalTrainer, grid: Tensor, max_length: int) -> list[int]:
    """Choose the most likely word at every step."""
    ids = [START]
    while len(ids) <= max_length and ids[-1] != END:
        logits, _ = trainer.decoder(grid.unsqueeze(0), torch.tensor([[ids]]))
        logits = logits[0, 0, -1].index_fill(0, torch.tensor([PAD, START, UNK]), -torch.inf)
        ids.append(int(logits.argmax()))
    return ids


def plain_bleu4(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Compute BLEU-4 of one caption, without smoothing."""
    score = 1.0
    for n in range(1, 5):
        counts = Counter({ngram: count for ngram, count in plain_ngrams(words).items() if len(ngram) == n})
        most = {ngram: max(plain_ngrams(reference)[ngram] for reference in references) for ngram in counts}
        matches = sum(min(count, most[ngram]) for ngram, count in counts.items())
        score *= (matches / counts.total() if counts else 0.0) ** 0.25
    closest = min((len(reference) for reference in references), key=lambda size: (abs(size - len(words)), size))
    return score * min(1.0, math.exp(1 - closest / len(words)))


def sampled(trainer: SelfCriticalTrainer, batch: Batch) -> list[list[int]]:
    (targets,), _ = trainer._select_targets([batch])
    return targets.tokens.flatten(0, 1).tolist()


def test_samples_depend_on_seed_step_and_image_alone(data: Path, tmp_path: Path, model: TrainedModel) -> None:
    trainer = make_refiner(data, tmp_path, model, refine_params(num_samples=20))
    batch = first_batch(trainer)
    first = sampled(trainer, batch)
    torch.manual_seed(999)
    assert sampled(trainer, batch) == first
    single = replace(batch, image_ids=batch.image_ids[1:2], grids=batch.grids[1:2], tokens=batch.tokens[1:2])
    words = [[token for token in ids if token != PAD] for ids in first]
    assert [[token for token in ids if token != PAD] for ids in sampled(trainer, single)] == words[20:40]
    assert sampled(make_refiner(data, tmp_path, model, refine_params(num_samples=20, seed=5)), batch) != first
    trainer.progress.batch += 1
    assert sampled(trainer, batch) != first


def test_special_tokens_are_never_sampled(data: Path, tmp_path: Path, model: TrainedModel) -> None:
    trainer = make_refiner(data, tmp_path, model, refine_params(num_samples=50))
    bias = trainer.decoder.output_proj.bias
    assert isinstance(bias, nn.Parameter)
    with torch.no_grad():
        bias[[PAD, START, UNK]] = 50.0
    for ids in sampled(trainer, first_batch(trainer)):
        words = ids[1:]
        while words and words[-1] == PAD:
            words.pop()
        assert 1 <= len(words) <= 6
        assert not {PAD, START, UNK} & set(words)
        assert END not in words[:-1]
        assert words[-1] == END or len(words) == 6
    trainer.train_step([first_batch(trainer)])
    (metrics,) = trainer.read_metrics()
    assert math.isfinite(metrics.gradient_norm)
    assert metrics.gradient_norm > 0


def test_a_step_with_large_weights_is_that_with_small_ones(
    data: Path, tmp_path: Path, model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products with large weights are computed by oneDNN (pipeline/decoder/products.py)."""

    def step_gradient(folder: Path) -> Tensor:
        folder.mkdir()
        trainer = make_refiner(data, folder, model, refine_params(num_samples=4, cross_entropy_weight=0.2))
        return take_step(trainer, first_batch(trainer))[1]

    expected = step_gradient(tmp_path / "small")
    monkeypatch.setattr(products, "SMALL_WEIGHT_SIZE", 0)
    monkeypatch.setattr(products, "MIN_ROWS", 1)
    torch.testing.assert_close(step_gradient(tmp_path / "large"), expected, rtol=1e-3, atol=1e-6)


def test_metrics_of_a_step_are_those_of_its_samples(data: Path, tmp_path: Path, model: TrainedModel) -> None:
    trainer = make_refiner(data, tmp_path, model, refine_params(num_samples=4))
    batch = first_batch(trainer)
    captions = [[model.vocabulary.words[token] for token in ids[1:] if token != PAD] for ids in sampled(trainer, batch)]
    trainer.train_step([batch])
    metrics = trainer.read_metrics()[0].samples
    corpus = corpus_of(data)
    rewards = [
        plain_cider_d(words, corpus[batch.image_ids[index // 4]], list(corpus.values()))
        for index, words in enumerate(captions)
    ]
    assert metrics["reward"] == metrics["baseline"] == pytest.approx(sum(rewards) / len(captions))
    assert trainer.progress.reward_sum / trainer.progress.num_samples == pytest.approx(metrics["reward"])
    assert metrics["length"] == sum(len([word for word in words if word != END_WORD]) for words in captions) / len(
        captions
    )
    distinct = [len({tuple(words) for words in captions[start : start + 4]}) for start in range(0, len(captions), 4)]
    assert metrics["distinct"] == sum(distinct) / len(captions)
    bad = [words[-1] != END_WORD or len(words) == 1 or words[-2] in {"a", "the", "is"} for words in captions]
    assert metrics["bad_endings"] == sum(bad) / len(captions)
    assert 0 < sum(bad) < len(captions)


def test_samples_are_without_dropout(data: Path, tmp_path: Path, model: TrainedModel) -> None:
    assert model.config.decoder.dropout > 0
    decoder = make_refiner(data, tmp_path, model, refine_params()).decoder.train()
    batch = first_batch(make_refiner(data, tmp_path, model, refine_params()))
    first, second = (decoder(batch.grids, batch.tokens[:, :, :-1])[0] for _ in range(2))
    assert torch.equal(first, second)


def finish(data: Path, folder: Path, model: TrainedModel, params: RefineParams) -> SelfCriticalTrainer:
    folder.mkdir(exist_ok=True)
    trainer = make_refiner(data, folder, model, params)
    while not trainer.is_finished:
        for _ in trainer.train_epoch(lambda _: False):
            pass
        trainer.end_epoch()
    return trainer


@all_kinds_exhaustively
@pytest.mark.slow
def test_the_reward_rises(data: Path, tmp_path: Path, kind: DecoderKind) -> None:
    params = train_params(max_epochs=4, decoder=decoder_params(kind=kind))
    model = read_model(train_tiny(data, tmp_path / "run", params))
    history = finish(
        data, tmp_path / "refined", model, refine_params(max_epochs=12, num_samples=5, patience=99)
    ).progress.history
    assert [row["epoch"] for row in history] == list(range(13))
    rewards = [row["train_reward"] for row in history]
    assert rewards[0] is None
    assert rewards[-1] > rewards[1] + 0.1
    assert max(row["val_cider"] for row in history) > history[0]["val_cider"]


def test_the_trained_model_is_selected_if_no_epoch_is_better(data: Path, tmp_path: Path, model: TrainedModel) -> None:
    params = refine_params(lr=lr_params(peak=1e-12), max_epochs=3, patience=2, ema_decay=0.5)
    trainer = finish(data, tmp_path, model, params)
    assert (trainer.progress.best_epoch, trainer.progress.epoch) == (0, 2)
    for name, weight in model.decoder.state_dict().items():
        assert torch.equal(trainer.best_weights[name], weight)
    last = finish(data, tmp_path, model, replace(params, select_by="last", patience=1))
    assert (last.progress.best_epoch, last.progress.epoch) == (3, 3)


def test_the_average_of_the_weights_contains_the_trained_model(data: Path, tmp_path: Path, model: TrainedModel) -> None:
    trained = parameters_to_vector(model.decoder.parameters()).detach()
    moved = {}
    for decay in (0.0, 0.999):
        params = refine_params(max_epochs=2, ema_decay=decay, select_by="last")
        trainer = finish(data, tmp_path / str(decay), model, params)
        weights = [trainer.best_weights[name] for name, _ in model.decoder.named_parameters()]
        moved[decay] = float((parameters_to_vector(weights) - trained).norm())
    assert 0 < moved[0.999] < 0.1 * moved[0.0]


@pytest.mark.slow
def test_a_run_stopped_after_every_step_resumes_to_the_same_bytes(
    data: Path, tmp_path: Path, model: TrainedModel
) -> None:
    params = refine_params(
        baseline="greedy", cross_entropy_weight=0.2, bleu4_weight=1.0, ema_decay=0.9, lr=lr_params(schedule="cosine")
    )

    def run(folder: Path, stop: int | None) -> dict[str, Any]:
        folder.mkdir()
        if stop is not None:
            take_steps(make_refiner(data, folder, model, params), stop)
            torch.manual_seed(999)
        trainer = make_refiner(data, folder, model, params)
        assert (trainer.is_resumed, trainer.global_step) == (stop is not None, stop or 0)
        take_steps(trainer, 10**9)
        with safe_open(folder / CHECKPOINT_FILE, framework="pt") as file:
            return {**file.metadata(), **{name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}}  # noqa: SIM118

    expected = run(tmp_path / "0", None)
    for stop in range(1, 10):
        assert run(tmp_path / str(stop), stop) == expected


def test_a_process_without_an_image_adds_nothing(data: Path, tmp_path: Path, model: TrainedModel) -> None:
    trainer = make_refiner(data, tmp_path, model, refine_params(cross_entropy_weight=0.2, max_grad_norm=1e9))
    batch = first_batch(trainer)
    weights = {name: value.clone() for name, value in trainer.decoder.state_dict().items()}
    empty = replace(
        batch,
        image_ids=batch.image_ids[:1],
        grids=batch.grids[:1],
        tokens=torch.full_like(batch.tokens[:1], PAD),
        has_captions=False,
    )
    trainer.train_step([batch])
    (alone,) = trainer.read_metrics()
    expected = gradient(trainer)
    other = make_refiner(data, tmp_path, model, refine_params(cross_entropy_weight=0.2, max_grad_norm=1e9))
    assert {name: value.sum() for name, value in other.decoder.state_dict().items()} == {
        name: value.sum() for name, value in weights.items()
    }
    other.train_step([batch, empty])
    (both,) = other.read_metrics()
    assert both.samples == alone.samples
    torch.testing.assert_close(gradient(other), expected, rtol=1e-5, atol=1e-8)


def test_one_train_image_has_no_reward(data: Path, tmp_path: Path, model: TrainedModel) -> None:
    records = [
        Record(image_id=image_id, file=f"{image_id}.jpg", split=split, captions=("a red thing",))
        for image_id, split in ((0, "train"), (24, "val"))
    ]
    write_token_files(tmp_path, records)
    (tmp_path / "features").symlink_to(data / "features")
    with pytest.raises(UserError, match=r"refine: CIDEr-D is not defined for the train split"):
        make_refiner(tmp_path, tmp_path, model, refine_params(select_by="last"))


def test_errors_name_the_section(data: Path, tmp_path: Path, model: TrainedModel) -> None:
    params = refine_params(lr=lr_params(peak=1e30, warmup_steps=0), max_grad_norm=1e30)
    with pytest.raises(UserError, match=r"refine: epoch 1, step 2: .*Lower refine\.lr\.peak or refine\.max_grad_norm"):
        finish(data, tmp_path, model, params)


def test_a_mean_of_no_others_is_refused() -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 2 with baseline mean, got 1"):
        refine_params(num_samples=1)
    assert refine_params(num_samples=1, baseline="greedy").num_samples == 1
