import math

import pytest
import torch

from pipeline.decoder.objective import objective


def test_the_loss_of_a_worked_example() -> None:
    """Two captions of one image: the second has one word, the other place asks for nothing."""
    logits = torch.zeros(1, 2, 2, 4)
    targets = torch.tensor([[[1, 2], [3, 0]]])
    attention = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[0.2, 0.8], [0.9, 0.1]]]])
    loss = objective(logits, attention, targets, coverage_weight=2.0)
    assert loss.cross_entropy.item() == pytest.approx(math.log(4))
    first = ((1 - 1.5) ** 2 + (1 - 0.5) ** 2) / 2
    second = ((1 - 0.2) ** 2 + (1 - 0.8) ** 2) / 2
    assert loss.coverage.item() == pytest.approx((first + second) / 2)
    assert loss.total.item() == pytest.approx(math.log(4) + first + second)


def test_rows_that_only_fill_the_batch_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(2, 2, 3, 5, generator=generator)
    attention = torch.rand(2, 2, 3, 4, generator=generator)
    targets = torch.tensor([[[1, 2, 0], [3, 4, 2]], [[2, 2, 2], [0, 0, 0]]])
    whole = objective(logits, attention, targets, 1.0)
    logits[1, 1], attention[1, 1] = 99.0, 99.0
    for part, again in zip(whole, objective(logits, attention, targets, 1.0), strict=True):
        assert part.item() == pytest.approx(again.item())
