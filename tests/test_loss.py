"""The training loss, on examples worked by hand and against PyTorch."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.training import output_layer
from pipeline.training.loss import (
    caption_loss,
    count_targets,
    predict_words,
    projected_caption_loss,
    sum_attention_entropy,
)


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


@pytest.mark.parametrize(("label_smoothing", "has_weights"), [(0.0, False), (0.1, False), (0.0, True)])
def test_chunks_give_the_loss_and_the_gradients_of_all_logits(
    label_smoothing: float, has_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 words of 50 in chunks of 3 words at most, against `caption_loss`; a quarter is padding."""
    torch.manual_seed(0)
    projection = nn.Linear(6, 50).double()
    outputs = torch.randn(4, 5, 5, 6, dtype=torch.float64)
    targets = torch.randint(1, 50, (4, 5, 5)) * (torch.rand(4, 5, 5) < 0.75)
    alpha = torch.rand(4, 5, 5, 3, dtype=torch.float64)
    weights = torch.randn(4, 5, dtype=torch.float64) if has_weights else None
    results = []
    for max_logits in (2**22, 3 * 50):
        monkeypatch.setattr(output_layer, "MAX_LOGITS", max_logits)
        inputs = outputs.clone().requires_grad_()
        projection.zero_grad()
        loss = projected_caption_loss(inputs, projection, alpha, targets, label_smoothing, weights)
        loss.total(loss.counts, 0.3).backward()
        results.append([*loss, inputs.grad, projection.weight.grad, projection.bias.grad])
    assert output_layer.needs_chunks(outputs, projection)
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_chunks_predict_the_words_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    projection, outputs = nn.Linear(6, 50), torch.randn(4, 5, 5, 6)
    targets = torch.randint(1, 50, (4, 5, 5)) * (torch.rand(4, 5, 5) < 0.75)
    expected_cross_entropy, expected = predict_words(outputs, projection, targets)
    monkeypatch.setattr(output_layer, "MAX_LOGITS", 3 * 50)
    cross_entropy, predicted = predict_words(outputs, projection, targets)
    assert cross_entropy.item() == pytest.approx(expected_cross_entropy.item(), rel=1e-6)
    assert torch.equal(predicted[targets != 0], expected[targets != 0])
