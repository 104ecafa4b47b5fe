import math

import pytest
import torch
from torch.nn import functional as F

from pipeline.training.loss import caption_loss


def test_the_loss_of_a_worked_example() -> None:
    """Two captions of one image: the second has one word, the other place asks for nothing."""
    logits = torch.zeros(1, 2, 2, 4)
    targets = torch.tensor([[[1, 2], [3, 0]]])
    attention = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[0.2, 0.8], [0.9, 0.1]]]])
    loss = caption_loss(logits, attention, targets)
    assert loss.counts.tolist() == [3, 2]
    assert loss.cross_entropy.item() == pytest.approx(3 * math.log(4))
    first = ((1 - 1.5) ** 2 + (1 - 0.5) ** 2) / 2
    second = ((1 - 0.2) ** 2 + (1 - 0.8) ** 2) / 2
    assert loss.coverage.item() == pytest.approx(first + second)
    assert loss.total(loss.counts, 2.0).item() == pytest.approx(math.log(4) + first + second)


def test_batches_of_a_step_add_up_to_the_loss_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(4, 2, 3, 5, generator=generator)
    attention = torch.rand(4, 2, 3, 4, generator=generator)
    targets = torch.randint(0, 5, (4, 2, 3), generator=generator)
    whole = caption_loss(logits, attention, targets, 0.1)
    parts = [caption_loss(logits[part], attention[part], targets[part], 0.1) for part in (slice(1), slice(1, 4))]
    counts = parts[0].counts + parts[1].counts
    assert counts.tolist() == whole.counts.tolist()
    in_parts = sum(part.total(counts, 0.3).item() for part in parts)
    assert in_parts == pytest.approx(whole.total(whole.counts, 0.3).item())


def test_label_smoothing_is_pytorchs_own() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 3, 5, generator=generator)
    targets = torch.tensor([[[1, 2, 0], [3, 4, 2]], [[2, 2, 2], [1, 0, 0]]])
    loss = caption_loss(logits, torch.rand(2, 2, 3, 4, generator=generator), targets, 0.2)
    flat, asked = logits.flatten(0, 2), targets.flatten()
    expected = F.cross_entropy(flat, asked, ignore_index=0, reduction="sum", label_smoothing=0.2)
    assert loss.smoothed.item() == pytest.approx(expected.item())
    plain = F.cross_entropy(flat, asked, ignore_index=0, reduction="sum")
    assert loss.cross_entropy.item() == pytest.approx(plain.item())


def test_rows_that_only_fill_the_batch_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(2, 2, 3, 5, generator=generator)
    attention = torch.rand(2, 2, 3, 4, generator=generator)
    targets = torch.tensor([[[1, 2, 0], [3, 4, 2]], [[2, 2, 2], [0, 0, 0]]])
    whole = caption_loss(logits, attention, targets)
    logits[1, 1], attention[1, 1] = 99.0, 99.0
    for part, again in zip(whole, caption_loss(logits, attention, targets), strict=True):
        assert part.item() == pytest.approx(again.item())
