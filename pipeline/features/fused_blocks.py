"""Residual blocks for a CPU in float32 whose convolutions apply ReLU and add the shortcut to their sums in registers.

PyTorch reads and writes every feature map once more for each ReLU and each addition, a tenth of the time of a ResNet.
oneDNN does both as it stores the result of a convolution, with the same rounding. Convolutions of 3 x 3 have fewer
multiplications (`winograd.py`) where that pays.
"""

from functools import cached_property

import torch
from torch import Tensor, nn

from pipeline.features.clip_resnets import ClipBottleneck
from pipeline.features.torchvision_resnets import BasicBlock, Bottleneck
from pipeline.features.winograd import WinogradConvolution


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

    def __init__(self, block: BasicBlock | Bottleneck | ClipBottleneck) -> None:
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


def fuse_blocks(module: nn.Module) -> nn.Module:
    """Replace the residual blocks of a module with folded batch norms by `FusedBlock`, in place and recursively."""
    for name, child in module.named_children():
        if isinstance(child, BasicBlock | Bottleneck | ClipBottleneck):
            setattr(module, name, FusedBlock(child))
        else:
            fuse_blocks(child)
    return module
