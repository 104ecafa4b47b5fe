"""Learning rate schedules."""

from typing import Any

import pytest

from tests.factories import lr_params


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"warmup_steps": 4, "schedule": "constant"}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"warmup_steps": 0, "schedule": "step", "step_epochs": 2}, [1, 1, 1, 1, 0.5, 0.5]),
        ({"warmup_steps": 0, "schedule": "cosine"}, [1, 0.933013, 0.75, 0.5, 0.25, 0.066987]),
        ({"warmup_steps": 2, "schedule": "cosine"}, [0.5, 0.933013, 0.75, 0.5, 0.25, 0.066987]),
    ],
)
def test_learning_rate_of_each_step(changes: dict[str, Any], expected: list[float]) -> None:
    params = lr_params(peak=1.0, **changes)
    rates = [params.lr_at(step, steps_per_epoch=2, max_epochs=3) for step in range(6)]
    assert rates == pytest.approx(expected, abs=1e-6)
