"""The ResNets of CLIP (Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision).

They differ from torchvision's in three ways: a stem of three convolutions, average pooling instead of max pooling and
of strided convolutions in the blocks (ResNet-D and antialiasing), and attention pooling, which grids do not need. The
parameters have the names of OpenAI's and open_clip's state dicts without the prefix `visual.`.

Shapes: B images, I and O input and output channels, H and W height and width.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from pipeline.features.resnets import ClipResNet

_SIZES: dict[ClipResNet, tuple[int, tuple[int, int, int, int]]] = {
    "RN50": (64, (3, 4, 6, 3)),
    "RN101": (64, (3, 4, 23, 3)),
    "RN50x4": (80, (4, 6, 10, 6)),
    "RN50x16": (96, (6, 8, 18, 8)),
}
"""Width of the stem and number of blocks of each layer."""

_EXPANSION = 4  # output channels of a block, relative to those of its 3 x 3 convolution


class ClipBottleneck(nn.Module):
    """A bottleneck block. Average pooling before the last convolution and in the shortcut replaces strides."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = _EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            shortcut: OrderedDict[str, nn.Module] = OrderedDict(
                [
                    ("-1", nn.AvgPool2d(stride)),
                    ("0", nn.Conv2d(in_channels, out_channels, 1, bias=False)),
                    ("1", nn.BatchNorm2d(out_channels)),
                ]
            )
            self.downsample = nn.Sequential(shortcut)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, I, H, W] to [B, O, H / stride, W / stride]."""
        residual = self.relu(self.bn1(self.conv1(images)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(self.pool(residual)))
        return cast(Tensor, self.relu(residual + self.downsample(images)))


def clip_layers(architecture: ClipResNet) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a ResNet by name, in the order of its forward pass."""
    width, num_blocks = _SIZES[architecture]
    stem = [(3, width // 2, 2), (width // 2, width // 2, 1), (width // 2, width, 1)]
    for index, (in_channels, out_channels, stride) in enumerate(stem, start=1):
        yield f"conv{index}", nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        yield f"bn{index}", nn.BatchNorm2d(out_channels)
        yield f"relu{index}", nn.ReLU(inplace=True)
    yield "avgpool", nn.AvgPool2d(2)
    in_channels = width
    for index, count in enumerate(num_blocks, start=1):
        channels = width * 2 ** (index - 1)
        strides = [1 if index == 1 else 2, *[1] * (count - 1)]
        blocks = []
        for stride in strides:
            blocks.append(ClipBottleneck(in_channels, channels, stride))
            in_channels = _EXPANSION * channels
        yield f"layer{index}", nn.Sequential(*blocks)
