"""On a GPU: nothing waits for it, and it trains, searches and encodes as a CPU does. `benchmarks/gpu.sh` runs these."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.captions.records import Record
from pipeline.decoder.decoder import DecoderKind
from pipeline.decoder.model_io import TrainedModel, read_model
from pipeline.device import copy_ahead, pin, setup_device, to_cpu
from pipeline.features.encoder import encode_batch, optimize_for_inference
from pipeline.features.encoding import encode
from pipeline.features.quantization.moments import dead_leaves
from pipeline.features.store import FeatureStore
from pipeline.generation.ensemble import caption_grids
from pipeline.training.batches import Batch
from pipeline.training.text_pretraining import JointTrainer
from pipeline.training.trainer import Trainer, TrainParams
from tests.factories import decoder_params, encode_params, random_encoder, refine_params, train_params
from tests.kinds import all_kinds, example_batch, small_decoder
from tests.test_encoding import write_image
from tests.test_host_waits import WORDS, all_searches
from tests.test_self_critical import make_refiner
from tests.tiny_dataset import CPU, EVERY_FEATURE, make_text_trainer, make_trainer, read_files, take_steps, train_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
    # CUDA, Triton and the debug mode below have warnings of their own.
    pytest.mark.filterwarnings("default"),
]

WITHOUT_DROPOUT = replace(EVERY_FEATURE, decoder=decoder_params(non_local_size=4), scheduled_sampling=0.0)


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return setup_device("cuda")


@contextmanager
def no_waits() -> Iterator[None]:
    """Raise an error if the host waits for the GPU inside the block."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def first_batches(trainer: Trainer, num_batches: int) -> list[Batch]:
    return list(trainer._train_batches.shuffled(trainer.params.seed, 0))[:num_batches]


@all_kinds
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_do_not_wait(data: Path, tmp_path: Path, gpu: torch.device, kind: DecoderKind, precision: str) -> None:
    dropout = {"dropout": 0.2, "region_dropout": 0.1, "word_dropout": 0.1}
    decoder = decoder_params(kind=kind, non_local_size=4, **dropout)
    trainer = make_trainer(data, tmp_path, replace(EVERY_FEATURE, decoder=decoder, precision=precision), gpu)
    trainer.train_step(first_batches(trainer, 2), log_entropy=True)  # creates handles and the optimizer's state
    trainer.read_metrics()
    with no_waits():
        steps = trainer.train_epoch(lambda _: True)
        assert [next(steps) for _ in range(2)] == [2, 3]
    assert [metrics.step for metrics in trainer.read_metrics()] == [2, 3]


def test_a_step_of_refine_waits_only_in_its_search(data: Path, tmp_path: Path, gpu: torch.device) -> None:
    model = read_model(train_tiny(data, tmp_path / "run", train_params(max_epochs=1), device=gpu))
    trainer = make_refiner(data, tmp_path, model, refine_params(cross_entropy_weight=0.2, ema_decay=0.9), gpu)
    batches = first_batches(trainer, 1)
    trainer.train_step(batches)
    generate = trainer._generate

    def search(*args: object) -> object:
        torch.cuda.set_sync_debug_mode("default")
        captions = generate(*args)  # type: ignore[arg-type]
        torch.cuda.set_sync_debug_mode("error")
        return captions

    trainer._generate = search  # type: ignore[method-assign, assignment]
    with no_waits():
        trainer.train_step(batches)
    assert len(trainer.read_metrics()) == 2


@all_kinds
def test_training_is_that_of_a_cpu(data: Path, tmp_path: Path, gpu: torch.device, kind: DecoderKind) -> None:
    params = replace(WITHOUT_DROPOUT, decoder=decoder_params(kind=kind, non_local_size=4))
    metrics = {}
    for device in (CPU, gpu):
        (tmp_path / device.type).mkdir()
        trainer = make_trainer(data, tmp_path / device.type, params, device)
        list(trainer.train_epoch(lambda _: True))
        metrics[device.type] = trainer.read_metrics()
        trainer.end_epoch()
    for on_cpu, on_gpu in zip(metrics["cpu"], metrics["cuda"], strict=True):
        assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-4)
        assert on_gpu.gradient_norm == pytest.approx(on_cpu.gradient_norm, rel=1e-3)
        assert on_gpu.attention_entropy == pytest.approx(on_cpu.attention_entropy, rel=1e-4)
        assert on_gpu.num_captions == on_cpu.num_captions


def train_epochs(trainer: Trainer, num_epochs: int) -> None:
    """Train some epochs without validation."""
    for trainer.progress.epoch in range(num_epochs):
        trainer.progress.batch = 0
        list(trainer.train_epoch(lambda _: True))


COMPILED = train_params(compile=True, gradient_accumulation_steps=2, ema_decay=0.9, max_epochs=6)


@all_kinds
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_graphs_compute_the_same_as_eager_steps(
    data: Path, tmp_path: Path, gpu: torch.device, kind: DecoderKind, precision: str
) -> None:
    """Weights, metrics and random numbers are the same to the bit, without compiled attention scores."""
    dropout = {"dropout": 0.2, "region_dropout": 0.1, "word_dropout": 0.1}
    decoder = decoder_params(kind=kind, non_local_size=4, **dropout)
    params = replace(EVERY_FEATURE, compile=True, decoder=decoder, precision=precision)
    results = []
    for name in ("replayed", "eager"):
        trainer = make_trainer(data, tmp_path / name, params, gpu)
        trainer.decoder.compiled = False
        graphs = trainer._replay
        assert graphs is not None
        if name == "eager":
            trainer._replay = None
        train_epochs(trainer, 8)
        metrics = [replace(step, data_wait=0.0) for step in trainer.read_metrics()]
        assert bool(graphs._captures) == (name == "replayed")
        results.append((metrics, trainer.decoder.state_dict(), torch.cuda.get_rng_state(gpu)))
    (metrics, weights, state), (expected_metrics, expected_weights, expected_state) = results
    assert metrics == expected_metrics
    assert all(torch.equal(weight, expected_weights[name]) for name, weight in weights.items())
    assert torch.equal(state, expected_state)


def test_replayed_steps_do_not_wait(data: Path, tmp_path: Path, gpu: torch.device) -> None:
    trainer = make_trainer(data, tmp_path, train_params(compile=True), gpu)
    batches = first_batches(trainer, 1)
    for _ in range(6):
        trainer.train_step(batches)
    assert trainer._replay is not None
    assert len(trainer._replay._captures) == 1
    with no_waits():
        trainer.train_step(batches)
    assert len(trainer.read_metrics()) == 7


def test_replayed_text_has_the_gradients_of_eager_text(data_with_text: Path, tmp_path: Path, gpu: torch.device) -> None:
    params = replace(WITHOUT_DROPOUT, compile=True, ema_decay=0.0)
    weights = []
    for name in ("replayed", "eager"):
        trainer = make_text_trainer(JointTrainer, data_with_text, tmp_path / name, params, gpu)
        trainer.decoder.compiled = False
        graphs = trainer._text_replay
        assert graphs is not None
        if name == "eager":
            trainer._text_replay = None
        train_epochs(trainer, 8)
        assert bool(graphs._captures) == (name == "replayed")
        weights.append(trainer.decoder.state_dict())
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.parametrize("params", [EVERY_FEATURE, COMPILED], ids=["eager", "compiled"])
def test_a_run_stopped_after_every_step_resumes_to_the_same_bytes(
    data: Path, tmp_path: Path, gpu: torch.device, params: TrainParams
) -> None:
    (tmp_path / "0").mkdir()
    expected = read_files(train_tiny(data, tmp_path / "0" / "run", params, device=gpu))
    for stop in range(1, 3 * params.max_epochs):
        folder = tmp_path / str(stop) / "run"
        folder.mkdir(parents=True)
        take_steps(make_trainer(data, folder, params, gpu), stop)
        torch.manual_seed(999)
        assert read_files(train_tiny(data, folder, params, device=gpu)) == expected


@all_searches
@all_kinds
def test_captions_are_those_of_a_cpu(gpu: torch.device, kind: DecoderKind, search: object) -> None:
    decoder, (grids, _) = small_decoder(kind).eval(), example_batch()
    image_ids = range(len(grids))
    expected = caption_grids([decoder], WORDS, grids, image_ids, search)  # type: ignore[arg-type]
    found = caption_grids([decoder.to(gpu)], WORDS, grids.to(gpu), image_ids, search)  # type: ignore[arg-type]
    for captions, expected_captions in zip(found, expected, strict=True):
        assert [caption.words for caption in captions] == [caption.words for caption in expected_captions]
        for caption, expected_caption in zip(captions, expected_captions, strict=True):
            assert caption.score == pytest.approx(expected_caption.score, abs=1e-6)
            np.testing.assert_allclose(caption.attention, expected_caption.attention, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "compiled", "error"), [("float32", False, 1e-3), ("bfloat16", False, 0.03), ("bfloat16", True, 0.03)]
)
def test_grids_are_those_of_a_cpu(gpu: torch.device, precision: str, compiled: bool, error: float) -> None:
    encoder = random_encoder("resnet18", "layer3", 8)
    images = dead_leaves(5, 64, seed=1)
    expected = encode_batch(optimize_for_inference(encoder, "float32", False, CPU), images).astype(np.float32)
    network = optimize_for_inference(encoder, precision, compiled, gpu)  # type: ignore[arg-type]
    for _ in range(4):  # the last are replayed, if compiled
        grids = encode_batch(network, images).astype(np.float32)
        assert np.linalg.norm(grids - expected) / np.linalg.norm(expected) < error


def test_the_stage_encodes_images_as_on_a_cpu(tmp_path: Path, gpu: torch.device) -> None:
    """40 images are 3 batches, of which 2 are encoded at once."""
    weights, image_dir = tmp_path / "weights.safetensors", tmp_path / "images"
    save_file(random_encoder("resnet18", "layer3", 8).state_dict(), weights)
    image_dir.mkdir()
    for index in range(40):
        write_image(image_dir / f"{index}.jpg", index)
    records = [Record(image_id=i, file=f"{i}.jpg", split="train", captions=("an image",)) for i in range(40)]
    grids = []
    for name, device in (("cpu", CPU), ("gpu", gpu), ("again", gpu)):
        with encode(records, image_dir, encode_params(weights), tmp_path / name, device, num_threads=2) as result:
            grids.append(FeatureStore(result.store).grids(range(40)).astype(np.float32))
    expected, found, again = grids
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-3
    assert np.array_equal(again, found)


def test_tensors_are_copied_ahead_in_order(gpu: torch.device) -> None:
    items = [(index, (pin(torch.full((1000, 100), index), gpu),)) for index in range(5)]
    with no_waits():
        copied = list(copy_ahead(items, gpu))
    assert [value for value, _ in copied] == list(range(5))
    for value, (tensor,) in copied:
        assert tensor.device.type == "cuda"
        assert (to_cpu(tensor) == value).all()


def test_a_model_trained_on_a_gpu_is_read_on_a_cpu(data: Path, tmp_path: Path, gpu: torch.device) -> None:
    model: TrainedModel = read_model(train_tiny(data, tmp_path / "run", train_params(max_epochs=1), device=gpu))
    assert {parameter.device.type for parameter in model.decoder.parameters()} == {"cpu"}
