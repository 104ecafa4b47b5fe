"""Sizes of the encoders' grids."""

from typing import get_args

import pytest
import torch

from pipeline.features.encoder import GridEncoder
from pipeline.features.resnets import STRIDES, Architecture, Layer, num_channels


@pytest.mark.parametrize("architecture", ["resnet18", "resnet34", "resnet50"])
def test_sizes_of_grids_equal_those_of_torchvision(architecture: Architecture) -> None:
    for layer in get_args(Layer):
        with torch.device("meta"):
            shape = GridEncoder(architecture, layer)(torch.empty(1, 3, 64, 64)).shape
        side = 64 // STRIDES[layer]
        assert tuple(shape[1:]) == (num_channels(architecture, layer), side, side)
