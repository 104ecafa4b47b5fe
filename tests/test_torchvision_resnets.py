"""torchvision's ResNets: equality with torchvision."""

from typing import get_args

import pytest
import torch
import torchvision

from pipeline.features.encoder import GridEncoder
from pipeline.features.resnets import TorchvisionResNet


@pytest.mark.parametrize("architecture", get_args(TorchvisionResNet))
def test_weights_have_the_names_and_shapes_of_torchvision(architecture: TorchvisionResNet) -> None:
    with torch.device("meta"):
        weights = GridEncoder(architecture, "layer4").state_dict()
        expected = torchvision.models.get_model(architecture, weights=None).state_dict()

    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: tensor.shape for name, tensor in expected.items() if not name.startswith("fc.")
    }


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_grids_have_the_bits_of_torchvision(architecture: TorchvisionResNet) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        resnet = torchvision.models.get_model(architecture, weights=None).eval()
    with torch.device("meta"):
        encoder = GridEncoder(architecture, "layer4").eval()
    encoder.load_state_dict(resnet.state_dict(), strict=False, assign=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    with torch.inference_mode():
        assert torch.equal(resnet.fc(encoder(images).mean((2, 3), keepdim=True).flatten(1)), resnet(images))
