"""Throughput of training: captions per second, and the fraction of time spent waiting for data."""

import time


class Throughput:
    """Rates since this object was created."""

    def __init__(self) -> None:
        """Start the clock."""
        self._start = time.monotonic()
        self._num_captions = 0
        self._data_wait = 0.0

    def update(self, num_captions: int, data_wait: float) -> None:
        """Add an optimizer step.

        Args:
            num_captions: Captions of the step.
            data_wait: Seconds that the step waited for its batches.
        """
        self._num_captions += num_captions
        self._data_wait += data_wait

    def rates(self) -> dict[str, float]:
        """Return captions per second and the fraction of time spent waiting for data, 0 to 1."""
        elapsed = time.monotonic() - self._start
        return {
            "captions_per_second": self._num_captions / elapsed,
            "data_wait_fraction": self._data_wait / elapsed,
        }
