"""The ResNets of torchvision that can encode images, up to one of their layers (He et al. 2016)."""

from typing import Literal

Architecture = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Layer = Literal["layer2", "layer3", "layer4"]

STRIDES: dict[Layer, int] = {"layer2": 8, "layer3": 16, "layer4": 32}
"""Input pixels per grid cell."""


def num_channels(architecture: Architecture, layer: Layer) -> int:
    """Return the number of output channels of a layer."""
    expansion = 1 if architecture in ("resnet18", "resnet34") else 4  # of the bottleneck blocks
    return 16 * STRIDES[layer] * expansion
