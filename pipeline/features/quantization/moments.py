"""How large the activations of a frozen ResNet get, told without a picture of what it is for.

A batch norm gives each channel a mean and a deviation, and has learned which. Nagel et al. 2019, Data-Free Quantization
through Weight Equalization and Bias Correction.

O channels that a batch norm gives.
"""

import copy
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.features.images import Pixels, normalize

# Deviations above the mean that activations seldom go beyond.
REACH = 6

_LEAVES, _PICTURES, _SIZE = 1500, 2, 224


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and standard deviation of each channel, float64 [O]; values count as normally distributed."""

    mean: Tensor
    deviation: Tensor

    def __add__(self, other: "Moments") -> "Moments":
        """Those of a sum of independent values."""
        return Moments(mean=self.mean + other.mean, deviation=torch.hypot(self.deviation, other.deviation))

    @property
    def rectified(self) -> "Moments":
        """Those of the values with 0 in place of negative ones."""
        deviation = self.deviation.clamp_min(1e-30)
        ratio = self.mean / deviation
        positive = torch.special.ndtr(ratio)
        density = torch.exp(-(ratio**2) / 2) / (2 * torch.pi) ** 0.5
        mean = self.mean * positive + deviation * density
        square = (self.mean**2 + deviation**2) * positive + self.mean * deviation * density
        return Moments(mean=mean, deviation=(square - mean**2).clamp_min(0).sqrt())

    @property
    def largest(self) -> Tensor:
        """What values seldom exceed, and no less than 0, [O]."""
        return (self.mean + REACH * self.deviation).clamp_min(0)


def find_moments(encoder: nn.Module) -> dict[nn.BatchNorm2d, Moments]:
    """Moments of what each batch norm of an encoder in eval mode gives; the weights alone decide them.

    Of each channel those that reach further of two: of what was measured with `dead_leaves`, and of what the batch
    norm was trained to give, which is lost where it is folded into its convolution.
    """
    measured = _measured_moments(encoder)
    return {norm: _ensemble_dirs(moments, _kept_moments(norm)) for norm, moments in measured.items()}


def _measured_moments(encoder: nn.Module) -> dict[nn.BatchNorm2d, Moments]:
    """Those with `dead_leaves` for pictures, in float64, in which machines differ least."""
    exact = copy.deepcopy(encoder).double()
    found: dict[nn.BatchNorm2d, Moments] = {}

    def note(norm: nn.BatchNorm2d, given: Tensor) -> None:
        deviation, mean = torch.std_mean(given, (0, 2, 3))
        found[norm] = Moments(mean=mean, deviation=deviation)

    for norm, copied in zip(_norms(encoder), _norms(exact), strict=True):
        copied.register_forward_hook(lambda _module, _taken, given, norm=norm: note(norm, given))
    with torch.no_grad():
        exact(normalize(torch.from_numpy(dead_leaves(_PICTURES, _SIZE, seed=0))).double())
    return found


def _kept_moments(norm: nn.BatchNorm2d) -> Moments | None:
    """Those that it gave in training; none where it is new or folded away."""
    if not cast(Tensor, norm.running_mean).any():
        return None
    return Moments(mean=norm.bias.double(), deviation=norm.weight.double().abs())


def _ensemble_dirs(one: Moments, other: Moments | None) -> Moments:
    """Of each channel the moments that reach further."""
    if other is None:
        return one
    further = other.largest > one.largest
    return Moments(
        mean=torch.where(further, other.mean, one.mean), deviation=torch.where(further, other.deviation, one.deviation)
    )


def _norms(encoder: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]


def dead_leaves(count: int, size: int, seed: int) -> Pixels:
    """Pictures of discs that cover one another, uint8 [count, size, size, 3].

    Edges, areas and contrasts are about as frequent in them as in photographs: as many discs are visible of each
    size. Lee, Mumford and Huang 2001, Occlusion Models for Natural Images.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    pictures = np.zeros((count, size, size, 3), dtype=np.uint8)
    for picture in pictures:
        # Radii of a density that falls with their cube, from 3 px to nearly the whole picture.
        radii = rng.uniform((1 / size) ** 2, (1 / 3) ** 2, _LEAVES) ** -0.5
        colors = rng.uniform(0, 255, (_LEAVES, 1)) + rng.normal(0, 30, (_LEAVES, 3))
        centers = rng.uniform(0, size, (_LEAVES, 2))
        for radius, (row, column), color in zip(radii, centers, colors.clip(0, 255), strict=True):
            picture[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = color
    return pictures
