"""Ranges of the activations of a frozen ResNet, estimated without calibration images.

The parameters of a batch norm are the mean and the standard deviation of its output in training: Nagel et al. 2019,
Data-Free Quantization through Weight Equalization and Bias Correction.

Shapes: C channels of a batch norm.
"""

import copy
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.features.images import Pixels, normalize
from pipeline.features.resnets import Normalization

# Activations rarely exceed their mean by more standard deviations than this.
NUM_STDS = 6

_NUM_DISCS, _NUM_IMAGES, _IMAGE_SIZE = 1500, 2, 224


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and standard deviation of the values of each channel, which are assumed to be normally distributed."""

    mean: Tensor
    """float64 [C]"""
    std: Tensor
    """float64 [C]"""

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of the sum of two independent values."""
        return Moments(mean=self.mean + other.mean, std=torch.hypot(self.std, other.std))

    def after_relu(self) -> "Moments":
        """Return the moments of the values after a ReLU."""
        std = self.std.clamp_min(1e-30)
        ratio = self.mean / std
        positive = torch.special.ndtr(ratio)  # probability of a positive value
        density = torch.exp(-(ratio**2) / 2) / (2 * torch.pi) ** 0.5
        mean = self.mean * positive + std * density
        mean_square = (self.mean**2 + std**2) * positive + self.mean * std * density
        return Moments(mean=mean, std=(mean_square - mean**2).clamp_min(0).sqrt())

    def upper_bound(self) -> Tensor:
        """Return an upper bound, at least 0, that each channel rarely exceeds: [C]."""
        return (self.mean + NUM_STDS * self.std).clamp_min(0)


def estimate_moments(encoder: nn.Module) -> dict[nn.BatchNorm2d, Moments]:
    """Estimate the moments of every batch norm's output from the weights alone.

    Each channel has two estimates: moments measured on `dead_leaves` images, and moments stored by the batch norm,
    which are lost if the batch norm was folded into its convolution. The one with the larger upper bound is used.

    Args:
        encoder: A ResNet in eval mode.

    Returns:
        The moments of each batch norm's output.
    """
    measured = _measured_moments(encoder)
    return {norm: _larger_moments(moments, _trained_moments(norm)) for norm, moments in measured.items()}


def _measured_moments(encoder: nn.Module) -> dict[nn.BatchNorm2d, Moments]:
    """Measure moments on `dead_leaves` images, in float64, whose rounding differs least between machines."""
    double_encoder = copy.deepcopy(encoder).double()
    measured: dict[nn.BatchNorm2d, Moments] = {}

    def record(norm: nn.BatchNorm2d, output: Tensor) -> None:
        std, mean = torch.std_mean(output, (0, 2, 3))
        measured[norm] = Moments(mean=mean, std=std)

    for norm, double_norm in zip(_batch_norms(encoder), _batch_norms(double_encoder), strict=True):
        double_norm.register_forward_hook(lambda _module, _input, output, norm=norm: record(norm, output))
    with torch.no_grad():
        images = torch.from_numpy(dead_leaves(_NUM_IMAGES, _IMAGE_SIZE, seed=0))
        double_encoder(normalize(images, cast(Normalization, encoder.normalization)).double())
    return measured


def _trained_moments(norm: nn.BatchNorm2d) -> Moments | None:
    """Return the moments of a batch norm's output in training, or None if it is untrained or folded."""
    if not cast(Tensor, norm.running_mean).any():
        return None
    return Moments(mean=norm.bias.double(), std=norm.weight.double().abs())


def _larger_moments(measured: Moments, trained: Moments | None) -> Moments:
    """Return for each channel the moments with the larger upper bound."""
    if trained is None:
        return measured
    use_trained = trained.upper_bound() > measured.upper_bound()
    return Moments(
        mean=torch.where(use_trained, trained.mean, measured.mean),
        std=torch.where(use_trained, trained.std, measured.std),
    )


def _batch_norms(encoder: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]


def dead_leaves(num_images: int, size: int, seed: int) -> Pixels:
    """Draw images of overlapping random discs, with edges and contrasts about as frequent as in photographs.

    Disc sizes are scale-invariant. Lee, Mumford and Huang 2001, Occlusion Models for Natural Images.

    Args:
        num_images: Number of images.
        size: Side of the images in px.
        seed: Random seed.

    Returns:
        uint8 [num_images, size, size, 3].
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    images = np.zeros((num_images, size, size, 3), dtype=np.uint8)
    for image in images:
        # The density of the radii falls with their cube, from 3 px to nearly the whole image.
        radii = rng.uniform((1 / size) ** 2, (1 / 3) ** 2, _NUM_DISCS) ** -0.5
        colors = rng.uniform(0, 255, (_NUM_DISCS, 1)) + rng.normal(0, 30, (_NUM_DISCS, 3))
        centers = rng.uniform(0, size, (_NUM_DISCS, 2))
        for radius, (row, column), color in zip(radii, centers, colors.clip(0, 255), strict=True):
            image[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = color
    return images
