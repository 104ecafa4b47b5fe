"""When to write the next checkpoint, or to show progress."""

import time


class CheckpointTimer:
    """Limits the optimizer steps and the seconds between two checkpoints, or two updates of the progress bar."""

    def __init__(self, max_steps: int, max_seconds: float) -> None:
        """Start the timer.

        Args:
            max_steps: Maximum optimizer steps between checkpoints.
            max_seconds: Maximum seconds between checkpoints.
        """
        self._max_steps = max_steps
        self._max_seconds = max_seconds
        self.restart()

    def restart(self) -> None:
        """Start again after a checkpoint."""
        self._num_steps = 0
        self._start = time.monotonic()

    def step(self) -> bool:
        """Count an optimizer step and return whether a checkpoint is due after it."""
        self._num_steps += 1
        return self._num_steps >= self._max_steps or time.monotonic() - self._start > self._max_seconds
