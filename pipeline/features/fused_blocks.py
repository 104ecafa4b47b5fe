"""Residual blocks for a CPU whose convolutions apply ReLU and add the shortcut to their sums in registers.

PyTorch reads and writes every feature map once more for each ReLU and each addition, a tenth of the time of a ResNet in
float32. oneDNN does both as it stores the result of a convolution, with the same rounding.
"""

import torch
from torch import Tensor, nn

from pipeline.features.torchvision_resnets import BasicBlock, Bottleneck


class FusedBlock(nn.Module):
    """A residual block whose batch norms are folded into its convolutions."""

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        names = ("conv1", "conv2", "conv3")
        self.convolutions = nn.ModuleList(getattr(block, name) for name in names if hasattr(block, name))
        self.downsample = block.downsample[0] if block.downsample is not None else None

    def forward(self, features: Tensor) -> Tensor:
        """Compute the block, in place where the shortcut is the identity."""
        *inner, last = self.convolutions
        shortcut = features if self.downsample is None else self.downsample(features)
        for convolution in inner:
            features = torch.ops.mkldnn._convolution_pointwise(features, *_arguments(convolution), "relu", [], "")
        result: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            shortcut, features, *_arguments(last), "add", 1.0, "relu", [], ""
        )
        return result


def _arguments(layer: nn.Module) -> tuple[object, ...]:
    """Return weight, bias and settings of a convolution as oneDNN's operations take them."""
    assert isinstance(layer, nn.Conv2d)
    return layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups


def fuse_blocks(module: nn.Module) -> nn.Module:
    """Replace the residual blocks of a module with folded batch norms by `FusedBlock`, in place and recursively."""
    for name, child in module.named_children():
        if isinstance(child, BasicBlock | Bottleneck):
            setattr(module, name, FusedBlock(child))
        else:
            fuse_blocks(child)
    return module
