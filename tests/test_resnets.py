"""Sizes of the encoders' grids."""

from typing import get_args

import pytest
import torch
import torchvision

from pipeline.features.encoder import GridEncoder
from pipeline.features.resnets import STRIDES, Layer, TorchvisionResNet, num_channels


@pytest.mark.parametrize("architecture", get_args(TorchvisionResNet))
def test_sizes_of_grids_equal_those_of_torchvision(architecture: TorchvisionResNet) -> None:
    for layer in get_args(Layer):
        with torch.device("meta"):
            shape = GridEncoder(architecture, layer)(torch.empty(1, 3, 64, 64)).shape
        side = 64 // STRIDES[layer]
        assert tuple(shape[1:]) == (num_channels(architecture, layer), side, side)


def test_every_resnet_of_torchvision_is_listed() -> None:
    module = torchvision.models.resnet18.__module__
    names = torchvision.models.list_models()
    assert set(get_args(TorchvisionResNet)) == {
        name for name in names if torchvision.models.get_model_builder(name).__module__ == module
    }
