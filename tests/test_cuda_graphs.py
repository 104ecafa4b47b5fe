"""CUDA graphs. Training and encoding with them are tested in test_gpu.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pipeline.cuda_graphs import _EAGER_CALLS, GraphedFunction
from pipeline.device import setup_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return setup_device("cuda")


def noisy(values: Tensor, factor: Tensor) -> Tensor:
    return values * factor + torch.rand_like(values)


def test_replays_compute_the_same_as_eager_calls(gpu: torch.device) -> None:
    graphed = GraphedFunction(noisy)
    inputs = [(torch.rand(3, 4 + call % 2, device=gpu) * 9, torch.rand((), device=gpu)) for call in range(20)]
    torch.manual_seed(1)
    expected = [noisy(*tensors) for tensors in inputs]
    torch.manual_seed(1)
    found = [graphed(*tensors).clone() for tensors in inputs]
    assert len(graphed._captures) == 2
    assert all(map(torch.equal, found, expected))


def test_frequent_shapes_are_captured(gpu: torch.device) -> None:
    calls = []

    def count(values: Tensor) -> Tensor:
        calls.append(len(values))
        return values + 1

    graphed = GraphedFunction(count)
    for _ in range(_EAGER_CALLS + 3):
        assert torch.equal(graphed(torch.zeros(2, device=gpu)), torch.ones(2, device=gpu))
    assert calls == [2] * (_EAGER_CALLS + 1)  # eager, and one capture
    graphed(torch.zeros(3, device=gpu))
    assert calls[-1] == 3
    assert len(graphed._captures) == 1


def test_threads_do_not_share_results(gpu: torch.device) -> None:
    graphed = GraphedFunction(lambda values: values.square().sqrt())

    def call(number: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream(gpu)):
            values = torch.full((1000, 1000), float(number), device=gpu)
            return all(bool((graphed(values) == number).all()) for _ in range(50))

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(call, range(8)))
