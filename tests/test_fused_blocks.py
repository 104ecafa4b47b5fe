"""Fused residual blocks against the blocks that they replace."""

import pytest
import torch

from pipeline.features.clip_resnets import ClipBottleneck
from pipeline.features.encoder import IMAGES_PER_BATCH, GridEncoder, optimize_for_inference
from pipeline.features.resnets import Architecture
from pipeline.features.torchvision_resnets import BasicBlock, Bottleneck
from tests import clip_reference


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "resnext50_32x4d", "RN50"])
def test_fused_blocks_equal_the_blocks_that_they_replace(architecture: Architecture) -> None:
    with torch.device("meta"):
        encoder = GridEncoder(architecture, "layer3")
    encoder.load_state_dict(clip_reference.random_weights(encoder), assign=True)
    encoder.eval().requires_grad_(False)
    images = torch.rand(IMAGES_PER_BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    network = optimize_for_inference(encoder, "float32", False, torch.device("cpu"))

    assert not any(
        isinstance(module, torch.nn.BatchNorm2d | BasicBlock | Bottleneck | ClipBottleneck)
        for module in network.modules()
    )
    expected = encoder(images)
    assert expected.std() > 0.1
    # The network overwrites its own features, but neither the images nor what it returned before.
    result, again = network(images), network(images)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(result, again)
