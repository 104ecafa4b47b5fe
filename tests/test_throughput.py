"""Throughput of training, with a fake clock."""

import time

import pytest

from pipeline.training.throughput import Throughput


def test_rates_are_those_since_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", iter([100.0, 104.0, 110.0]).__next__)
    throughput = Throughput()
    throughput.update(num_captions=20, data_wait=1.0)
    assert throughput.rates() == {"captions_per_second": 5.0, "data_wait_fraction": 0.25}
    throughput.update(num_captions=30, data_wait=0.0)
    assert throughput.rates() == {"captions_per_second": 5.0, "data_wait_fraction": 0.1}
