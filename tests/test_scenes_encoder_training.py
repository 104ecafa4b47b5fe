import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.artifacts import file_digest
from pipeline.errors import UserError
from pipeline.features.encoder import encode_grids, read_encoder
from pipeline.features.images import normalize
from pipeline.features.resnets import IMAGENET
from pipeline.params import load
from pipeline.scenes.dataset import RenderParams
from pipeline.scenes.encoder_training import (
    ARCHITECTURE,
    LAYER,
    STRIDE,
    EncoderWithHeads,
    SceneEncoderParams,
    TrainingSet,
    classification_loss,
    stack,
    train,
    train_scene_encoder,
    write_weights,
)
from pipeline.scenes.examples import (
    ATTRIBUTES,
    BACKGROUND,
    IGNORE,
    SamplingSpec,
    center_cell,
    object_labels,
    sample_example,
)
from pipeline.scenes.scene import COLORS, SHAPES
from tests.paths import ROOT

SCENES = ROOT / "data" / "scenes"
HELD_OUT = (("red", "sphere"), ("blue", "cube"))
SPEC = SamplingSpec(seed=3, image_size=64, stride=STRIDE, held_out=HELD_OUT)
PARAMS = SceneEncoderParams(
    seed=5,
    num_train=24,
    num_test=4,
    batch_size=4,
    max_epochs=2,
    peak_lr=2e-3,
    warmup_fraction=0.2,
    weight_decay=0.05,
    background_weight=0.3,
    brightness_jitter=0.1,
)


@pytest.fixture(scope="module")
def training_set() -> TrainingSet:
    return stack([sample_example(SPEC, "train", index) for index in range(PARAMS.num_train)], HELD_OUT)


@pytest.fixture
def deterministic():
    """Use one thread and deterministic algorithms."""
    num_threads, was_deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(was_deterministic)
    torch.set_num_threads(num_threads)


def render_params(image_size: int) -> RenderParams:
    return RenderParams(
        seed=1, image_size=image_size, num_train=1, num_val=1, num_test=1, duplicate_rate=0.3, held_out=HELD_OUT
    )


@pytest.mark.slow
def test_training_lowers_the_loss(training_set, deterministic, tmp_path):
    def loss(model: EncoderWithHeads) -> float:
        return classification_loss(
            model.train(),
            normalize(training_set.images, IMAGENET),
            training_set.labels,
            training_set.floors,
            training_set.held_out,
            PARAMS.background_weight,
        ).item()

    trained = train(PARAMS, training_set, tmp_path / "checkpoint")
    torch.manual_seed(PARAMS.seed)
    assert loss(trained) < 0.75 * loss(EncoderWithHeads())


@pytest.mark.slow
def test_training_twice_gives_the_same_file(training_set, deterministic, tmp_path):
    for name in ("first", "second"):
        model = train(PARAMS, training_set, tmp_path / f"{name}.checkpoint")
        write_weights(model.encoder, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.slow
def test_resume_after_a_kill_gives_the_same_weights(training_set, deterministic, tmp_path):
    params = replace(PARAMS, max_epochs=6)
    uninterrupted = train(params, training_set, tmp_path / "uninterrupted").state_dict()
    safetensors.torch.save_file(vars(training_set), tmp_path / "training_set")
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, repr(params), tmp_path / "training_set", tmp_path / "killed"], cwd=ROOT
    )
    while not (tmp_path / "killed").is_file():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()

    num_epochs = torch.load(tmp_path / "killed", weights_only=True)["num_epochs"]
    assert 1 <= num_epochs < params.max_epochs
    resumed = train(params, training_set, tmp_path / "killed").state_dict()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in uninterrupted)


TRAIN = """
import sys
from pathlib import Path
import safetensors.torch
import torch
from pipeline.scenes.encoder_training import SceneEncoderParams, TrainingSet, train
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
train(eval(sys.argv[1]), TrainingSet(**safetensors.torch.load_file(sys.argv[2])), Path(sys.argv[3]))
"""


def test_a_damaged_checkpoint_is_one_sentence(training_set, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    for content in (b"", b"half a checkpoint"):
        checkpoint.write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoint: not a valid checkpoint\. Delete it"):
            train(PARAMS, training_set, checkpoint)
    for state in ([], {"model": {}, "optimizer": {}, "num_epochs": 1}):
        torch.save(state, checkpoint)
        with pytest.raises(UserError, match=r"checkpoint: not a valid checkpoint\. Delete it"):
            train(PARAMS, training_set, checkpoint)


def test_a_held_out_pair_has_no_gradient(training_set):
    red, sphere, cube = 1 + COLORS.index("red"), 1 + SHAPES.index("sphere"), 1 + SHAPES.index("cube")
    labels = torch.full((1, len(ATTRIBUTES), 4, 4), IGNORE, dtype=torch.int8)
    labels[0, :, 2, 2] = torch.tensor([cube, red, 1, 1])
    model = EncoderWithHeads()
    images = normalize(training_set.images[:1], IMAGENET)
    classification_loss(model, images, labels, training_set.floors[:1], training_set.held_out, 0.3).backward()
    shape_gradient = model.attribute_head.bias.grad[: 1 + len(SHAPES)]
    assert shape_gradient[sphere] == 0
    assert (shape_gradient[[i for i in range(len(shape_gradient)) if i != sphere]] != 0).all()


def test_a_loss_that_is_not_finite_is_an_error(training_set, tmp_path):
    with pytest.raises(UserError, match="not finite") as error:
        train(replace(PARAMS, peak_lr=1e30, warmup_fraction=0.0), training_set, tmp_path / "checkpoint")
    assert all(fact in str(error.value) for fact in ("epoch 1", "step", "encoder.peak_lr"))


def test_an_image_size_that_is_not_a_multiple_of_the_stride_is_an_error(tmp_path):
    with (
        pytest.raises(UserError, match=r"render\.image_size") as error,
        train_scene_encoder(PARAMS, render_params(72), tmp_path, num_workers=1),
    ):
        pass
    assert all(fact in str(error.value) for fact in ("multiple of 16", "72"))


@pytest.mark.slow
def test_finished_weights_load(tmp_path):
    params = replace(PARAMS, max_epochs=1)
    with train_scene_encoder(params, render_params(64), tmp_path, num_workers=1) as (weights, metrics_file):
        metrics = json.loads(metrics_file.read_text())
    assert metrics["weights_sha256"] == file_digest(weights)
    assert metrics["objects"]["held_out"]["num_objects"] >= 2
    assert read_encoder(weights, ARCHITECTURE, LAYER).channels == 256


@pytest.mark.slow
def test_a_linear_probe_reads_shape_and_color_from_features_of_the_shipped_encoder():
    path = SCENES / "encoder.safetensors"
    assert path.stat().st_size <= 6_000_000
    params = load(SCENES / "params.yaml", "render", RenderParams)
    # The seed differs from that of the encoder's training.
    spec = SamplingSpec(seed=987, image_size=params.image_size, stride=STRIDE, held_out=params.held_out)
    encoder = read_encoder(path, ARCHITECTURE, LAYER)
    features, labels = read_cells(encoder, spec, "train", 150, at_centers=False)
    test_features, test_labels = read_cells(encoder, spec, "test", 30, at_centers=True)
    for column, attribute in enumerate(ATTRIBUTES):
        if attribute in ("shape", "color"):
            scores = test_features @ fit_ridge_probe(features, labels[:, column])
            assert (scores.argmax(axis=1) == test_labels[:, column]).mean() >= 0.9, attribute


def test_shipped_metrics_belong_to_the_shipped_weights():
    metrics = json.loads((SCENES / "encoder.json").read_text(encoding="utf-8"))
    assert metrics["weights_sha256"] == file_digest(SCENES / "encoder.safetensors")
    assert metrics["objects"]["seen"]["shape_and_color"] >= 0.95


def read_cells(encoder, spec, split, num_examples, *, at_centers):
    """Return features [cells, 257], the last of them 1 as a bias, and labels [cells, A] of cells with an object."""
    features, labels = [], []
    examples = [sample_example(spec, split, index) for index in range(num_examples)]
    grids = encode_grids(encoder, np.stack([example.image for example in examples]))
    for example, grid in zip(examples, grids, strict=True):
        side = example.labels.shape[-1]
        if at_centers:
            cells = [center_cell(box, STRIDE) for box in example.boxes]
            labels += [object_labels(obj) for obj in example.scene.objects]
        else:
            cells = list(zip(*np.nonzero(example.labels[0] > BACKGROUND), strict=True))
            labels += [example.labels[:, row, column] for row, column in cells]
        features += [np.append(grid[row * side + column].astype(np.float32), 1) for row, column in cells]
    return np.array(features), np.array(labels)


def fit_ridge_probe(features, labels):
    targets = np.eye(labels.max() + 1)[labels]
    return np.linalg.solve(features.T @ features + np.eye(features.shape[1]), features.T @ targets)
