import pytest
import torch
from torch import nn

from pipeline.decoder.layers import Dropout, lstm_step


def test_dropout_zeroes_with_probability_p_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropout, values = Dropout(0.3), torch.ones(200, 500, requires_grad=True)
    dropped = dropout(values)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped)
    assert dropout.eval()(values) is values


def test_a_step_of_the_lstm_equals_that_of_torch() -> None:
    torch.manual_seed(0)
    cell = nn.LSTMCell(3, 5).double()
    x, h, c = (torch.randn(4, size, dtype=torch.float64) for size in (3, 5, 5))
    gates = x @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh
    for result, expected in zip(lstm_step(gates, c), cell(x, (h, c)), strict=True):
        torch.testing.assert_close(result, expected)
