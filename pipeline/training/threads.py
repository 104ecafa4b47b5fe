"""The number of CPU threads of a training run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ONE_THREAD_BELOW = 2**13
"""Images of a batch times hidden size, below which one thread trains faster than two (docs/benchmarks.md)."""


@contextmanager
def training_threads(batch_size: int, hidden_size: int) -> Iterator[None]:
    """Train small batches of a small decoder on one CPU thread, and all others on those of PyTorch.

    Operations of small tensors take as long as the threads take to wake up. Results of one thread do not depend on the
    number of cores.

    Args:
        batch_size: Images of a batch.
        hidden_size: Hidden size of the decoder.
    """
    num_threads = torch.get_num_threads()
    if batch_size * hidden_size < _ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
