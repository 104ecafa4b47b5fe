"""Factories of small encoder settings for tests."""

from pathlib import Path

from pipeline.features.encoder import EncodeParams
from pipeline.features.store import EncoderSpec


def small_spec(**changes: object) -> EncoderSpec:
    """Return the spec of a ResNet-18 with grids of 2 x 2 regions and 3 channels, with some fields changed."""
    values: dict[str, object] = {
        "architecture": "resnet18",
        "layer": "layer3",
        "weights_digest": "0" * 64,
        "image_size": 32,
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
        "precision": "float32",
        "compile": False,
        "views": ("whole",),
    }
    return EncodeParams(**(values | changes))  # type: ignore[arg-type]
