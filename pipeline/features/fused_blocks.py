"""Stem and blocks of ResNets for a CPU in float32, whose convolutions apply ReLU and add the shortcut in registers.

PyTorch reads and writes every feature map once more for each ReLU and each addition, a tenth of the time of a ResNet.
oneDNN does both as it stores the result of a convolution, with the same rounding. Convolutions of 3 x 3 have fewer
multiplications (`winograd.py`) where that pays.
"""

from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.features.clip_resnets import ClipBottleneck
from pipeline.features.torchvision_resnets import Block
from pipeline.features.winograd import WinogradConvolution

ResidualBlock = Block | ClipBottleneck

_IMAGES_IN_STEM = 4
"""Images whose feature maps in the stem are small enough for the allocator to keep their memory."""


class FusedConvolution(nn.Module):
    """A convolution followed by ReLU."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution
        self._supports_winograd = WinogradConvolution.supports(convolution)

    @cached_property
    def _winograd(self) -> WinogradConvolution:
        return WinogradConvolution(self.convolution)

    def forward(self, features: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Compute the convolution, the addition of a shortcut, which is overwritten by the result, and ReLU."""
        if self._supports_winograd and WinogradConvolution.pays(features):
            return self._winograd(features, shortcut)
        layer = self.convolution
        arguments = layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups
        result: Tensor
        if shortcut is None:
            result = torch.ops.mkldnn._convolution_pointwise(features, *arguments, "relu", [], "")
        else:
            result = torch.ops.mkldnn._convolution_pointwise_.binary(
                shortcut, features, *arguments, "add", 1.0, "relu", [], ""
            )
        return result


class FusedBlock(nn.Module):
    """A residual block whose batch norms are folded into its convolutions."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        names = ("conv1", "conv2", "conv3")
        *inner, last = (FusedConvolution(getattr(block, name)) for name in names if hasattr(block, name))
        pool = [block.pool] if isinstance(block, ClipBottleneck) else []
        self.inner, self.last = nn.Sequential(*inner, *pool), last
        self.downsample = block.downsample

    def forward(self, features: Tensor) -> Tensor:
        """Compute the block, in place where the shortcut is the identity."""
        shortcut = features if self.downsample is None else self.downsample(features)
        result: Tensor = self.last(self.inner(features), shortcut)
        return result


class FusedStem(nn.Module):
    """The convolution, ReLU and max pooling before the blocks of torchvision's ResNets."""

    def __init__(self, convolution: nn.Conv2d, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.convolution, self.pool = FusedConvolution(convolution), pool

    def forward(self, images: Tensor) -> Tensor:
        """Compute the stem, for some images at a time."""
        return torch.cat([self.pool(self.convolution(part)) for part in torch.split(images, _IMAGES_IN_STEM)])


def fuse_network(network: nn.Module) -> nn.Module:
    """Replace stem and blocks of a ResNet with folded batch norms by fused ones, in place."""
    if isinstance(pool := getattr(network, "maxpool", None), nn.MaxPool2d):
        network.conv1 = FusedStem(cast(nn.Conv2d, network.conv1), pool)
        network.relu = network.maxpool = nn.Identity()
    for name, child in network.named_children():
        if isinstance(child, nn.Sequential):
            setattr(network, name, nn.Sequential(*(FusedBlock(cast(ResidualBlock, block)) for block in child)))
    return network
