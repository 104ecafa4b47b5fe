"""CLIP's ResNet as functions of a state dict, slow and obvious: the reference for `clip_resnets.py`."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


def convolve(
    weights: Weights, images: Tensor, convolution: str, norm: str, stride: int = 1, padding: int = 0
) -> Tensor:
    images = F.conv2d(images, weights[f"{convolution}.weight"], stride=stride, padding=padding)
    statistics = (weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"])
    return F.batch_norm(images, *statistics, weights[f"{norm}.weight"], weights[f"{norm}.bias"])


def block(weights: Weights, images: Tensor, name: str, stride: int) -> Tensor:
    residual = F.relu(convolve(weights, images, f"{name}.conv1", f"{name}.bn1"))
    residual = F.relu(convolve(weights, residual, f"{name}.conv2", f"{name}.bn2", padding=1))
    residual = convolve(weights, F.avg_pool2d(residual, stride), f"{name}.conv3", f"{name}.bn3")
    if f"{name}.downsample.0.weight" in weights:
        images = convolve(weights, F.avg_pool2d(images, stride), f"{name}.downsample.0", f"{name}.downsample.1")
    return F.relu(residual + images)


def encode(weights: Weights, images: Tensor) -> dict[str, Tensor]:
    """Return the output [B, C, H, W] of every layer for images [B, 3, S, S]."""
    for index, stride in enumerate((2, 1, 1), start=1):
        images = F.relu(convolve(weights, images, f"conv{index}", f"bn{index}", stride, padding=1))
    images = F.avg_pool2d(images, 2)
    outputs = {}
    for layer in range(1, 5):
        num_blocks = len({name.split(".")[1] for name in weights if name.startswith(f"layer{layer}.")})
        for index in range(num_blocks):
            stride = 2 if layer > 1 and index == 0 else 1
            images = block(weights, images, f"layer{layer}.{index}", stride)
        outputs[f"layer{layer}"] = images
    return outputs


def random_weights(encoder: torch.nn.Module) -> dict[str, Tensor]:
    """Return a random state dict for an encoder, whose features keep their scale from block to block."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, tensor in encoder.state_dict().items():
        if tensor.dtype == torch.long:
            weights[name] = torch.zeros((), dtype=torch.long)
        elif tensor.dim() == 4:
            std = (2 / tensor[0].numel()) ** 0.5
            weights[name] = std * torch.randn(tensor.shape, generator=generator)
        elif name.endswith("running_var") or name.endswith("weight"):
            weights[name] = 0.5 + torch.rand(tensor.shape, generator=generator)
        else:
            weights[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
    return weights
