"""The number of CPU threads of a training run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.training.threads import training_threads
from tests.factories import train_params
from tests.tiny_dataset import train_tiny


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """Start with three threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize(("batch_size", "hidden_size", "expected"), [(8, 128, 1), (8, 512, 1), (32, 512, 3)])
def test_small_batches_of_small_decoders_have_one_thread(batch_size: int, hidden_size: int, expected: int) -> None:
    with training_threads(batch_size, hidden_size):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 3


def test_an_interrupted_run_gives_the_threads_back() -> None:
    with pytest.raises(KeyboardInterrupt), training_threads(1, 1):
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 3


def test_every_step_of_a_small_run_is_on_one_thread(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = set()
    forward = torch.nn.Embedding.forward

    def spy(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        used.add(torch.get_num_threads())
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", spy)
    train_tiny(data, tmp_path / "run", train_params(max_epochs=1))
    assert used == {1}
    assert torch.get_num_threads() == 3
