"""Factories of small encoders, decoders and training params for tests."""

from pathlib import Path

import torch

from pipeline.decoder.decoder import DecoderParams
from pipeline.features.encoder import EncodeParams, GridEncoder
from pipeline.features.quantization.moments import dead_leaves
from pipeline.features.resnets import Architecture, Layer
from pipeline.features.store import EncoderSpec
from pipeline.training.lr_schedule import LRParams
from pipeline.training.self_critical import RefineParams
from pipeline.training.trainer import TextPretrainingParams, TrainParams


def small_spec(**changes: object) -> EncoderSpec:
    """Return the spec of a ResNet-18 with grids of 2 x 2 regions and 3 channels, with some fields changed."""
    values: dict[str, object] = {
        "architecture": "resnet18",
        "layer": "layer3",
        "weights_digest": "0" * 64,
        "image_height": 32,
        "image_width": 32,
        "resize": "squash",
        "precision": "float32",
        "compiled": False,
        "grid_height": 2,
        "grid_width": 2,
        "channels": 3,
    }
    return EncoderSpec(**(values | changes))  # type: ignore[arg-type]


def encode_params(weights: Path | str, **changes: object) -> EncodeParams:
    """Return params of a ResNet-18 up to layer3 on whole images of 32 px, with some fields changed."""
    values: dict[str, object] = {
        "architecture": "resnet18",
        "layer": "layer3",
        "weights": Path(weights),
        "image_size": 32,
        "resize": "squash",
        "pool": None,
        "precision": "float32",
        "compile": False,
        "views": ("whole",),
    }
    return EncodeParams(**(values | changes))  # type: ignore[arg-type]


def random_encoder(architecture: Architecture, layer: Layer, num_images: int) -> GridEncoder:
    """Return a random ResNet whose batch norms have running statistics of some images, as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = GridEncoder(architecture, layer)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        encoder.train()(torch.from_numpy(dead_leaves(num_images, 64, seed=3)).permute(0, 3, 1, 2).float() / 64 - 2)
    return encoder.eval().requires_grad_(False)


def decoder_params(**changes: object) -> DecoderParams:
    """Return params of a small decoder without dropout, with some fields changed."""
    values: dict[str, object] = {
        "kind": "soft_attention",
        "embedding_size": 8,
        "hidden_size": 12,
        "attention_size": 8,
        "non_local_size": 0,
        "dropout": 0.0,
        "region_dropout": 0.0,
        "word_dropout": 0.0,
    }
    return DecoderParams(**(values | changes))  # type: ignore[arg-type]


def lr_params(**changes: object) -> LRParams:
    """Return params of a cosine schedule with 2 steps of warm-up, with some fields changed."""
    values: dict[str, object] = {
        "peak": 0.01,
        "warmup_steps": 2,
        "schedule": "cosine",
        "step_epochs": 1,
        "step_factor": 0.5,
    }
    return LRParams(**(values | changes))  # type: ignore[arg-type]


def train_params(**changes: object) -> TrainParams:
    """Return params of a short training run with dropout, with some fields changed."""
    values: dict[str, object] = {
        "seed": 3,
        "start_from": None,
        "start_from_grids": "refuse",
        "decoder": decoder_params(dropout=0.2, region_dropout=0.1, word_dropout=0.1),
        "text": None,
        "text_pretraining": TextPretrainingParams(
            max_epochs=2, joint_weight=0.0, num_regions=3, ridge_penalty=1.0, noise=0.1
        ),
        "batch_size": 5,
        "gradient_accumulation_steps": 1,
        "random_views": False,
        "max_epochs": 3,
        "optimizer": "adam",
        "weight_decay": 0.0,
        "lr": lr_params(),
        "max_grad_norm": 5.0,
        "label_smoothing": 0.0,
        "scheduled_sampling": 0.0,
        "doubly_stochastic_weight": 0.1,
        "ema_decay": 0.0,
        "precision": "float32",
        "compile": False,
        "select_by": "cider",
        "patience": 9,
        "max_length": 6,
    }
    return TrainParams(**(values | changes))  # type: ignore[arg-type]


def refine_params(**changes: object) -> RefineParams:
    """Return params of a short self-critical training run, with some fields changed."""
    values: dict[str, object] = {
        "max_epochs": 2,
        "seed": 4,
        "batch_size": 5,
        "num_samples": 3,
        "baseline": "mean",
        "bleu4_weight": 0.0,
        "cross_entropy_weight": 0.0,
        "lr": lr_params(schedule="constant"),
        "max_grad_norm": 5.0,
        "ema_decay": 0.0,
        "precision": "float32",
        "select_by": "cider",
        "patience": 9,
        "max_length": 6,
    }
    return RefineParams(**(values | changes))  # type: ignore[arg-type]
