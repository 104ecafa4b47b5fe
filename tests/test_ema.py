"""The exponential moving average of weights."""

import pytest
import torch
from torch import nn

from pipeline.training.ema import make_ema


def test_decay_warms_up_to_its_maximum() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = make_ema(model, 0.25)
    assert ema is not None
    expected, averages = 0.0, []
    for step in range(6):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update_parameters(model)
        # The first update copies the weights; update n then decays by min(0.25, (1 + n) / (10 + n)).
        decay = min(0.25, (1 + step) / (10 + step)) if step else 0.0
        expected = decay * expected + (1 - decay) * step
        averages.append((ema.module.weight.item(), expected))
    for average, by_hand in averages:
        assert average == pytest.approx(by_hand)


def test_without_warm_up_the_initial_weights_decay_from_the_first_update() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(8.0)
    ema = make_ema(model, 0.5, warms_up=False)
    assert ema is not None
    with torch.no_grad():
        model.weight.zero_()
    for expected in (4.0, 2.0, 1.0):
        ema.update_parameters(model)
        assert ema.module.weight.item() == expected


def test_decay_0_disables_it() -> None:
    assert make_ema(nn.Linear(1, 1), 0.0) is None
