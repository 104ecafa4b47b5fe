import torch
from torch import nn

from pipeline.decoder.non_local import NonLocalBlock


def test_the_block_changes_nothing_at_the_start_of_training() -> None:
    regions = torch.rand(2, 5, 8)
    torch.testing.assert_close(NonLocalBlock(8, 4)(regions), regions)


def test_what_it_adds_grows_with_the_number_of_alike_regions() -> None:
    torch.manual_seed(0)
    block = NonLocalBlock(8, 4).double()
    nn.init.normal_(block.w_z.weight)
    with torch.no_grad():
        block.phi.weight.copy_(block.theta.weight)  # a region is similar to regions like it
        for layer in (block.theta, block.phi, block.g):
            layer.bias.zero_()  # the background, which is 0, adds nothing
    regions = torch.zeros(3, 9, 8, dtype=torch.float64)
    alike = torch.randn(8, dtype=torch.float64)
    for num_alike in (1, 2, 3):
        regions[num_alike - 1, :num_alike] = alike
    added = (block(regions) - regions)[:, 0]
    assert added[0].norm() > 0.01
    torch.testing.assert_close(added[1], 2 * added[0])
    torch.testing.assert_close(added[2], 3 * added[0])
