"""The dot-product block of non-local neural networks (Wang et al. 2018, arXiv:1711.07971), with ReLU.

Attention averages: two alike objects and one give the same context vector. The weights of this block are not
normalized, so what it adds to a region grows with the number of regions like it, and a decoder can learn to count.

Shapes: `B` images, `P` regions, `D` region size, `N` size of the block.
"""

import torch
from torch import Tensor, nn

from pipeline.decoder.products import Linear


class NonLocalBlock(nn.Module):
    """Adds to each region a sum over the regions that are similar to it.

    The layers are theta, phi, g and W_z of the paper. Its factor 1 / P is 1 / sqrt(P) here, as few of the regions show
    alike objects. W_z starts at 0, where the block changes nothing.
    """

    def __init__(self, region_size: int, size: int) -> None:
        """Build a block with random weights.

        Args:
            region_size: Size of a region, D.
            size: Size of the projections, N.
        """
        super().__init__()
        self.theta = Linear(region_size, size)
        self.phi = Linear(region_size, size)
        self.g = Linear(region_size, size)
        self.w_z = Linear(size, region_size, bias=False)
        nn.init.zeros_(self.w_z.weight)

    def forward(self, regions: Tensor) -> Tensor:
        """Return the regions [B, P, D], each with what similar regions add to it."""
        num_regions, size = regions.shape[1], self.theta.out_features
        similarity = torch.bmm(self.theta(regions), self.phi(regions).transpose(1, 2)).relu()  # [B, P, P]
        summed: Tensor = torch.bmm(similarity, self.g(regions)) / (size * num_regions) ** 0.5  # [B, P, N], eqs. 1, 4
        added: Tensor = self.w_z(summed)
        return regions + added  # eq. 6
