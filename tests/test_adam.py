"""Adam without the compiler: the steps of PyTorch's optimizers, bit for bit, and what training imports."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.training.adam import Adam
from tests.imports import imported_packages


@pytest.mark.parametrize(("expected_class", "decoupled"), [(torch.optim.Adam, False), (torch.optim.AdamW, True)])
def test_steps_and_state_equal_those_of_pytorch(expected_class: type[torch.optim.Adam], decoupled: bool) -> None:
    torch.manual_seed(0)
    weight, expected_weight = (nn.Parameter(tensor) for tensor in torch.randn(5, 3).expand(2, 5, 3).clone())
    optimizer = Adam([weight], weight_decay=0.1, decoupled_weight_decay=decoupled)
    expected = expected_class([expected_weight], weight_decay=0.1, fused=True)
    for step in range(4):
        if step == 2:  # as after a checkpoint
            state = optimizer.state_dict()
            optimizer = Adam([weight], weight_decay=0.1, decoupled_weight_decay=decoupled)
            optimizer.load_state_dict(state)
        for each, parameter in ((optimizer, weight), (expected, expected_weight)):
            each.param_groups[0]["lr"] = 0.1 / (1 + step)
            each.zero_grad()
            parameter.pow(4).sum().backward()
            each.step()
        assert torch.equal(weight, expected_weight)
    for name, value in expected.state_dict()["state"][0].items():
        assert torch.equal(optimizer.state_dict()["state"][0][name], value)


@pytest.mark.slow
def test_training_does_not_import_the_compiler(data: Path, tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from tests.tiny_dataset import EVERY_FEATURE, train_tiny
train_tiny(Path({str(data)!r}), Path({str(tmp_path / "run")!r}), EVERY_FEATURE)
"""
    assert imported_packages(program, ["torch._dynamo", "sympy", "torchvision"]) == []
