"""What a GPU would make the host wait for: nothing in an optimizer step, and little in a search."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.captions.vocabulary import SPECIALS
from pipeline.decoder.decoder import DecoderKind
from pipeline.decoder.model_io import TrainedModel, read_model
from pipeline.errors import UserError
from pipeline.features.encoder import encode_grids, optimize_for_inference
from pipeline.features.quantization.moments import dead_leaves
from pipeline.generation import search as search_module
from pipeline.generation.ensemble import caption_grids
from pipeline.generation.search import SearchParams
from pipeline.training.teacher_forcing import evaluate_batch
from pipeline.training.text_pretraining import JointTrainer
from tests.factories import decoder_params, lr_params, random_encoder, refine_params, train_params
from tests.host_waits import HostWaits
from tests.kinds import V, all_kinds, example_batch, small_decoder
from tests.test_self_critical import make_refiner
from tests.tiny_dataset import EVERY_FEATURE, make_text_trainer, make_trainer, train_tiny

CPU = torch.device("cpu")
STEPS_PER_CHECK = 4


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let searches on the CPU check for finished images as seldom as on a GPU."""
    monkeypatch.setattr(search_module, "_STEPS_PER_CHECK", {"cpu": STEPS_PER_CHECK})


def test_reads_are_recorded() -> None:
    values, counter = torch.arange(3.0), torch.tensor(1)
    with HostWaits(counter) as waits:
        assert values[0].item() == 0
        assert int(counter) == 1
        assert values.tolist() == [0, 1, 2]
        values[values > 1] = 0
        values[[0, 1]] = 1
        values[0] = 2
        assert bool((values > 0).any())
        torch.multinomial(values, 1)
    assert waits.reads == ["item", "tolist", "__setitem__", "__setitem__", "__bool__"]


@all_kinds
def test_an_optimizer_step_reads_nothing(data: Path, tmp_path: Path, kind: DecoderKind) -> None:
    dropout = {"dropout": 0.2, "region_dropout": 0.1, "word_dropout": 0.1}
    params = replace(EVERY_FEATURE, decoder=decoder_params(kind=kind, non_local_size=4, **dropout))
    trainer = make_trainer(data, tmp_path, params)
    assert trainer._state.ema is not None
    batches = list(trainer._train_batches.shuffled(params.seed, 0))[:4]
    with HostWaits(trainer._state.ema.n_averaged) as waits:
        trainer.train_step(batches[:2], log_entropy=True)
        trainer.train_step(batches[2:])
        assert waits.reads == []
        assert [metrics.step for metrics in trainer.read_metrics()] == [1, 2]
    assert waits.reads == ["tolist"]


def test_a_joint_step_reads_nothing(data_with_text: Path, tmp_path: Path) -> None:
    trainer = make_text_trainer(JointTrainer, data_with_text, tmp_path / "checkpoint.safetensors", EVERY_FEATURE)
    assert trainer._state.ema is not None
    batches = list(trainer._train_batches.shuffled(1, 0))[:2]
    text = iter([next(trainer._text) for _ in batches])
    trainer._text = text
    with HostWaits(trainer._state.ema.n_averaged) as waits:
        trainer.train_step(batches)
        assert waits.reads == []
    assert not list(text)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_divergence_is_found_before_a_checkpoint_or_an_epoch_ends(data: Path, tmp_path: Path, stop: int) -> None:
    """Step 2 is the first whose loss is not finite, and the weights after it are not. Later steps are not looked at."""
    trainer = make_trainer(data, tmp_path, train_params(lr=lr_params(peak=1e30, warmup_steps=0), max_grad_norm=1e30))
    steps = trainer.train_epoch(lambda _: False)
    assert [next(steps) for _ in range(stop)] == list(range(1, stop + 1))
    if stop == 1:
        trainer.save_checkpoint()  # Weights of 1e30 are finite.
        return
    for read in (trainer.save_checkpoint, trainer.end_epoch, trainer.read_metrics):
        again = make_trainer(data, tmp_path, trainer.params)
        again._pending = list(trainer._pending)
        with pytest.raises(UserError, match=r"epoch 1, step 2: the loss is (nan|inf) at learning rate 9\.89e\+29"):
            getattr(again, read.__name__)()
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_never_has_a_weight_that_is_not_finite(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, train_params())
    next(trainer.train_epoch(lambda _: False))
    with torch.no_grad():
        next(trainer.decoder.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(UserError, match=r"epoch 1, step 1: the largest weight is nan"):
        trainer.save_checkpoint()
    assert not list(tmp_path.iterdir())


def test_evaluation_of_a_batch_reads_nothing(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, train_params())
    batch = next(trainer._val_batches.by_length())
    with HostWaits() as waits:
        evaluate_batch(trainer.decoder.eval(), batch)
    assert waits.reads == []


SEARCHES = {
    "greedy": SearchParams.greedy(12),
    "beam": replace(
        SearchParams.greedy(12), beam_size=3, n_best=2, no_repeat_ngram_size=2, length_normalization="gnmt"
    ),
    "groups": replace(SearchParams.greedy(12), beam_size=4, num_groups=2, diversity_penalty=0.3),
    "guided": replace(SearchParams.greedy(12), beam_size=3, guidance_scale=1.5),
    "sample": SearchParams.sampling(3, 12, seed=1),
    "nucleus": replace(SearchParams.sampling(3, 12, seed=1), top_k=5, top_p=0.9),
}
all_searches = pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
WORDS = (*SPECIALS, *(f"word{index}" for index in range(V - len(SPECIALS))))


@all_searches
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_search_reads_once_every_few_words_and_at_its_end(search: SearchParams) -> None:
    decoder, (grids, _) = small_decoder("soft_attention").eval(), example_batch()
    search = replace(search, min_length=search.max_length)  # no caption ends early
    with HostWaits() as waits:
        caption_grids([decoder], WORDS, grids, range(len(grids)), search)
    checks, results = search.max_length // STEPS_PER_CHECK, ["tolist"] * 4 + ["tolist", "cpu"]
    assert len(waits.reads) <= checks + len(results)


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return read_model(train_tiny(data, tmp_path_factory.mktemp("model") / "run", train_params(max_epochs=1)))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_step_of_refine_reads_only_in_its_search(data: Path, tmp_path: Path, model: TrainedModel) -> None:
    trainer = make_refiner(data, tmp_path, model, refine_params(cross_entropy_weight=0.2))
    batch = next(trainer._train_batches.shuffled(1, 0))
    with HostWaits() as search_waits:
        trainer._generate(batch, SearchParams.sampling(3, 6, seed=1))
    with HostWaits() as waits:
        trainer.train_step([batch])
    assert waits.reads == search_waits.reads


def test_encoding_a_batch_reads_the_grids_and_whether_they_are_finite() -> None:
    network = optimize_for_inference(random_encoder("resnet18", "layer3", 4), "float32", False, CPU)
    with HostWaits() as waits:
        encode_grids(network, dead_leaves(2, 64, seed=1))
    assert waits.reads == ["cpu", "__bool__"]
