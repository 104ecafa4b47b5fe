"""Loss and predictions in chunks of a large vocabulary, against those of all logits."""

import pytest
import torch
from torch import nn

from pipeline.training import output_layer
from pipeline.training.loss import predict_words, projected_caption_loss


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
