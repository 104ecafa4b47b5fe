"""Images prepared for decoding: regions with position encoding, attention keys and context vectors.

Shapes: `B` images, `K` captions per image (beams), `P` regions, `D` region size, `A` attention size.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

POSITION_CHANNELS = 16
"""Size of the position encoding of a region."""


def position_encoding(height: int, width: int) -> Tensor:
    """Encode the position of each region of a grid as sines and cosines of its x and y coordinates.

    The wavelengths are 4, 2, 1 and 1/2 times the side of the grid (after Vaswani et al. 2017; in two dimensions as in
    Carion et al. 2020).

    Args:
        height: Height of the grid, in regions.
        width: Width of the grid, in regions.

    Returns:
        Position encoding [P, 16] of the regions in row-major order.
    """
    x = ((torch.arange(width) + 0.5) / width).expand(height, width)
    y = ((torch.arange(height) + 0.5) / height).unsqueeze(1).expand(height, width)
    frequencies = torch.tensor([0.25, 0.5, 1.0, 2.0])  # cycles per side
    cycles = torch.stack([x, y], dim=-1).reshape(-1, 2, 1) * frequencies  # [P, 2, 4]
    return torch.cat([(2 * math.pi * cycles).sin(), (2 * math.pi * cycles).cos()], dim=-1).flatten(1)  # [P, 16]


@dataclass(frozen=True)
class EncodedImages(ABC):
    """Images prepared for decoding, from `Decoder.prepare`.

    A context vector is a sum of regions, weighted by attention, and some layers of a decoder project it linearly. The
    subclasses differ in the order of sum and projection:

    - `RegionFeatures` sums first, `(alpha @ regions) @ weight`, at every step.
    - `ProjectedRegions` projects first, `alpha @ (regions @ weight)`, with the second product computed once per image.
      This is faster for images with fewer regions than decoding steps.
    """

    image_terms: Tensor
    """What the kind of decoder computes from the mean region [B, 1, -1]."""
    keys: Tensor
    """Attention keys of the regions [B, P, A]."""

    @abstractmethod
    def attend(self, alpha: Tensor) -> Tensor:
        """Apply attention weights alpha [B, K, P]; `context_weights` project the result."""

    @abstractmethod
    def context_weights(self, layers: Sequence[nn.Linear]) -> Sequence[Tensor]:
        """Return matrices that project the result of `attend` as the layers project context vectors.

        Args:
            layers: The layers without bias that read context vectors, as passed to `encode_images`.
        """

    @abstractmethod
    def select_images(self, index: Tensor) -> "EncodedImages":
        """Return the images at indices [B']."""


@dataclass(frozen=True)
class RegionFeatures(EncodedImages):
    """Images whose context vectors are computed at every step."""

    regions: Tensor
    """Regions [B, P, D]."""

    def attend(self, alpha: Tensor) -> Tensor:
        """Return the context vectors [B, K, D]."""
        return torch.bmm(alpha, self.regions)

    def context_weights(self, layers: Sequence[nn.Linear]) -> Sequence[Tensor]:
        """Return the weights of the layers [D, -1]."""
        return [layer.weight.T for layer in layers]

    def select_images(self, index: Tensor) -> "RegionFeatures":
        """Return the images at indices [B']."""
        return RegionFeatures(self.image_terms[index], self.keys[index], self.regions[index])


@dataclass(frozen=True)
class ProjectedRegions(EncodedImages):
    """Images whose regions are projected once, so that no context vector is ever computed."""

    projections: Sequence[Tensor]
    """Regions as each layer projects them [B, P, -1]."""

    def attend(self, alpha: Tensor) -> Tensor:
        """Return `alpha` [B, K, P]: the products with the projected regions include the weighted sum."""
        return alpha

    def context_weights(self, layers: Sequence[nn.Linear]) -> Sequence[Tensor]:
        """Return the projected regions [B, P, -1]."""
        return self.projections

    def select_images(self, index: Tensor) -> "ProjectedRegions":
        """Return the images at indices [B']."""
        projections = [projection[index] for projection in self.projections]
        return ProjectedRegions(self.image_terms[index], self.keys[index], projections)


def encode_images(
    image_terms: Tensor, keys: Tensor, regions: Tensor, context_layers: Sequence[nn.Linear], num_steps: int
) -> EncodedImages:
    """Prepare images in the form that decodes faster.

    Args:
        image_terms: What the kind of decoder computes from the mean region [B, 1, -1].
        keys: Attention keys of the regions [B, P, A].
        regions: Regions [B, P, D].
        context_layers: The layers, without bias, that read context vectors.
        num_steps: Expected decoding steps per image, over all of its captions.

    Returns:
        `ProjectedRegions` for images with fewer regions than decoding steps, else `RegionFeatures`.
    """
    if num_steps > regions.shape[1]:
        return ProjectedRegions(image_terms, keys, [layer(regions) for layer in context_layers])
    return RegionFeatures(image_terms, keys, regions)
