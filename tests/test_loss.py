"""The training loss, on examples worked by hand and against PyTorch."""

import math

import pytest
import torch
from torch.nn import functional as F

from pipeline.training.loss import caption_loss, count_targets, sum_attention_entropy


def test_loss_of_an_example_worked_by_hand() -> None:
    """Two captions of one image; the second has one word and one position of padding."""
    logits = torch.zeros(1, 2, 2, 4)
    targets = torch.tensor([[[1, 2], [3, 0]]])
    alpha = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[0.2, 0.8], [0.9, 0.1]]]])
    loss = caption_loss(logits, alpha, targets)
    assert loss.counts.tolist() == [3, 2]
    assert loss.cross_entropy.item() == pytest.approx(3 * math.log(4))
    first = ((1 - 1.5) ** 2 + (1 - 0.5) ** 2) / 2
    second = ((1 - 0.2) ** 2 + (1 - 0.8) ** 2) / 2
    assert loss.doubly_stochastic.item() == pytest.approx(first + second)
    assert loss.total(loss.counts, 2.0).item() == pytest.approx(math.log(4) + first + second)


def test_losses_of_accumulated_batches_add_up_to_the_loss_of_one_large_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(4, 2, 3, 5, generator=generator)
    alpha = torch.rand(4, 2, 3, 4, generator=generator)
    targets = torch.randint(0, 5, (4, 2, 3), generator=generator)
    large = caption_loss(logits, alpha, targets, 0.1)
    small = [caption_loss(logits[part], alpha[part], targets[part], 0.1) for part in (slice(1), slice(1, 4))]
    counts = small[0].counts + small[1].counts
    assert counts.tolist() == large.counts.tolist()
    accumulated = sum(loss.total(counts, 0.3).item() for loss in small)
    assert accumulated == pytest.approx(large.total(large.counts, 0.3).item())


def test_label_smoothing_equals_that_of_pytorch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 3, 5, generator=generator)
    targets = torch.tensor([[[1, 2, 0], [3, 4, 2]], [[2, 2, 2], [1, 0, 0]]])
    loss = caption_loss(logits, torch.rand(2, 2, 3, 4, generator=generator), targets, 0.2)
    flat_logits, flat_targets = logits.flatten(0, 2), targets.flatten()
    smoothed = F.cross_entropy(flat_logits, flat_targets, ignore_index=0, reduction="sum", label_smoothing=0.2)
    assert loss.smoothed_cross_entropy.item() == pytest.approx(smoothed.item())
    unsmoothed = F.cross_entropy(flat_logits, flat_targets, ignore_index=0, reduction="sum")
    assert loss.cross_entropy.item() == pytest.approx(unsmoothed.item())


def test_padding_rows_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(2, 2, 3, 5, generator=generator)
    alpha = torch.rand(2, 2, 3, 4, generator=generator)
    targets = torch.tensor([[[1, 2, 0], [3, 4, 2]], [[2, 2, 2], [0, 0, 0]]])
    before = caption_loss(logits, alpha, targets)
    logits[1, 1], alpha[1, 1] = 99.0, 99.0
    for term, expected in zip(caption_loss(logits, alpha, targets), before, strict=True):
        assert term.tolist() == pytest.approx(expected.tolist())


def test_count_targets_ignores_padding_and_empty_captions() -> None:
    assert count_targets(torch.tensor([[[5, 2, 0], [7, 6, 2]], [[2, 0, 0], [0, 0, 0]]])).tolist() == [6, 3]


def test_attention_entropy_is_summed_over_words_alone() -> None:
    alpha = torch.tensor([[[[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]]])
    targets = torch.tensor([[[5, 2, 0]]])  # the last position is padding
    assert sum_attention_entropy(alpha, targets).item() == pytest.approx(math.log(4))
