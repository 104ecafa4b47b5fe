"""Encoder settings that tests make stores and grids with: small, and each spelled out but once."""

from pathlib import Path

from pipeline.features.encoder import EncodeParams
from pipeline.features.store import EncoderSpec


def small_spec(**changes: object) -> EncoderSpec:
    """The setting of a store: ResNet-18 on 32 px, to grids of 2 x 2 regions with 3 channels, but for the changes."""
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
    """Params of an encoder with these weights: ResNet-18 to layer3 on 32 px, whole pictures, but for the changes."""
    values: dict[str, object] = {
        "architecture": "resnet18",
        "layer": "layer3",
        "weights": str(weights),
        "image_size": 32,
        "precision": "float32",
        "compile": False,
        "views": ("whole",),
    }
    return EncodeParams(**(values | changes))  # type: ignore[arg-type]
