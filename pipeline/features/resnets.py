"""The ResNets that can encode images, up to one of their layers: names, sizes and input.

They are torchvision's (He et al. 2016; ResNeXt, Xie et al. 2017; wide ResNets, Zagoruyko and Komodakis 2016) and CLIP's
(Radford et al. 2021). A new family is an entry for each of its ResNets here, and one file with its networks, such as
`clip_resnets.py`, whose function `encoder.py` calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.features.views import CenterCrop, Frame, Resize

TorchvisionResNet = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
ClipResNet = Literal["RN50", "RN101", "RN50x4", "RN50x16"]
Architecture = Literal[TorchvisionResNet, ClipResNet]
Layer = Literal["layer2", "layer3", "layer4"]

STRIDES: dict[Layer, int] = {"layer2": 8, "layer3": 16, "layer4": 32}
"""Input pixels per grid cell."""


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """Mean and standard deviation of red, green and blue in 0 to 1, which the weights expect."""

    mean: tuple[float, float, float]
    standard_deviation: tuple[float, float, float]


IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), standard_deviation=(0.229, 0.224, 0.225))
"""The normalization of torchvision's weights."""
CLIP = Normalization(mean=(0.48145466, 0.4578275, 0.40821073), standard_deviation=(0.26862954, 0.26130258, 0.27577711))
"""The normalization of OpenAI's and open_clip's weights."""


@dataclass(frozen=True, kw_only=True)
class ResNet:
    """Sizes and input of a ResNet."""

    num_channels: int
    """Output channels of `layer4`; each earlier layer has half as many."""
    center_crop: CenterCrop
    """Recipe of evaluation of the published weights, used by `encode.resize: center_crop`."""
    normalization: Normalization = IMAGENET
    supports_int8: bool = True
    """Whether the network has the blocks that `QuantizedEncoder` computes."""


_CROP_256 = CenterCrop(scale=256 / 224, resampling="bilinear")
_CROP_232 = CenterCrop(scale=232 / 224, resampling="bilinear")
_CROP_CLIP = CenterCrop(scale=1.0, resampling="bicubic")

RESNETS: Mapping[Architecture, ResNet] = {
    "resnet18": ResNet(num_channels=512, center_crop=_CROP_256),
    "resnet34": ResNet(num_channels=512, center_crop=_CROP_256),
    "resnet50": ResNet(num_channels=2048, center_crop=_CROP_232),
    "resnet101": ResNet(num_channels=2048, center_crop=_CROP_232),
    "resnet152": ResNet(num_channels=2048, center_crop=_CROP_232),
    "resnext50_32x4d": ResNet(num_channels=2048, center_crop=_CROP_232),
    "resnext101_32x8d": ResNet(num_channels=2048, center_crop=_CROP_232),
    "resnext101_64x4d": ResNet(num_channels=2048, center_crop=_CROP_232),
    "wide_resnet50_2": ResNet(num_channels=2048, center_crop=_CROP_232),
    "wide_resnet101_2": ResNet(num_channels=2048, center_crop=_CROP_232),
    "RN50": ResNet(num_channels=2048, center_crop=_CROP_CLIP, normalization=CLIP, supports_int8=False),
    "RN101": ResNet(num_channels=2048, center_crop=_CROP_CLIP, normalization=CLIP, supports_int8=False),
    "RN50x4": ResNet(num_channels=2560, center_crop=_CROP_CLIP, normalization=CLIP, supports_int8=False),
    "RN50x16": ResNet(num_channels=3072, center_crop=_CROP_CLIP, normalization=CLIP, supports_int8=False),
}
MAX_CHANNELS = max(resnet.num_channels for resnet in RESNETS.values())


def num_channels(architecture: Architecture, layer: Layer) -> int:
    """Return the number of output channels of a layer."""
    return RESNETS[architecture].num_channels * STRIDES[layer] // STRIDES["layer4"]


def encoder_frame(architecture: Architecture, height: int, width: int, resize: Resize) -> Frame:
    """Return the input of an encoder, given by its height and width in px."""
    recipe = RESNETS[architecture].center_crop if resize == "center_crop" else None
    return Frame(height=height, width=width, center_crop=recipe)
