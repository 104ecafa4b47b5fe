"""The ResNets of torchvision (He et al. 2016; ResNeXt, Xie et al. 2017; wide ResNets, Zagoruyko and Komodakis 2016).

Outputs and names of parameters are those of `torchvision.models`, which is not imported here: it imports PyTorch's
compiler with its detection operators, a third of the start of `gridcap predict`.

Shapes: B images, I and O input and output channels, H and W height and width.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

from torch import Tensor, nn

from pipeline.features.resnets import TorchvisionResNet


class BasicBlock(nn.Module):
    """A block of two 3 x 3 convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, self.out_channels, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, I, H, W] to [B, O, H / stride, W / stride]."""
        residual = self.relu(self.bn1(self.conv1(images)))
        residual = self.bn2(self.conv2(residual))
        residual += images if self.downsample is None else self.downsample(images)
        return cast(Tensor, self.relu(residual))


class Bottleneck(nn.Module):
    """A bottleneck block, whose 3 x 3 convolution has the stride."""

    def __init__(self, in_channels: int, channels: int, stride: int, num_groups: int = 1, width: int = 64) -> None:
        """Build a block.

        Args:
            in_channels: Input channels.
            channels: A quarter of the output channels: 64 in `layer1`, twice as many in each later layer.
            stride: Stride of the block.
            num_groups: Groups of the 3 x 3 convolution.
            width: Channels of a group in `layer1`.
        """
        super().__init__()
        self.out_channels = 4 * channels
        inner_channels = num_groups * width * channels // 64
        self.conv1 = nn.Conv2d(in_channels, inner_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner_channels)
        self.conv2 = nn.Conv2d(inner_channels, inner_channels, 3, stride, 1, groups=num_groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner_channels)
        self.conv3 = nn.Conv2d(inner_channels, self.out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, self.out_channels, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, I, H, W] to [B, O, H / stride, W / stride]."""
        residual = self.relu(self.bn1(self.conv1(images)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        residual += images if self.downsample is None else self.downsample(images)
        return cast(Tensor, self.relu(residual))


Block = BasicBlock | Bottleneck

_SIZES: dict[TorchvisionResNet, tuple[Callable[[int, int, int], Block], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "resnext50_32x4d": (partial(Bottleneck, num_groups=32, width=4), (3, 4, 6, 3)),
    "resnext101_32x8d": (partial(Bottleneck, num_groups=32, width=8), (3, 4, 23, 3)),
    "resnext101_64x4d": (partial(Bottleneck, num_groups=64, width=4), (3, 4, 23, 3)),
    "wide_resnet50_2": (partial(Bottleneck, width=128), (3, 4, 6, 3)),
    "wide_resnet101_2": (partial(Bottleneck, width=128), (3, 4, 23, 3)),
}
"""Kind of the blocks and number of blocks of each layer."""


def torchvision_layers(architecture: TorchvisionResNet) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a ResNet by name, in the order of its forward pass."""
    make_block, num_blocks = _SIZES[architecture]
    in_channels = 64
    yield "conv1", nn.Conv2d(3, in_channels, 7, 2, padding=3, bias=False)
    yield "bn1", nn.BatchNorm2d(in_channels)
    yield "relu", nn.ReLU(inplace=True)
    yield "maxpool", nn.MaxPool2d(3, 2, padding=1)
    for index, count in enumerate(num_blocks, start=1):
        blocks = []
        for stride in [1 if index == 1 else 2, *[1] * (count - 1)]:
            blocks.append(make_block(in_channels, 64 * 2 ** (index - 1), stride))
            in_channels = blocks[-1].out_channels
        yield f"layer{index}", nn.Sequential(*blocks)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return the convolution of the shortcut with its batch norm, or None for a shortcut without one."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
