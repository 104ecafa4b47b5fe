"""SIGTERM and SIGINT during training: they end the process only after a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.distributed import Processes


class Interrupt:
    """The signal that this process has received, if any."""

    def __init__(self) -> None:
        self._signum: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has been received."""
        return self._signum is not None

    def receive(self, signum: int, _: object) -> None:
        """Record a signal; `defer_signals` installs this handler."""
        self._signum = signum

    def exit_if_requested(self, processes: Processes) -> None:
        """End the process if rank 0 has received a signal. Every process must call this.

        Raises:
            KeyboardInterrupt: The signal is SIGINT. SIGTERM ends the process at once.
        """
        signum = processes.broadcast(self._signum)
        if signum is not None:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)


@contextmanager
def defer_signals() -> Iterator[Interrupt]:
    """Record SIGTERM and SIGINT inside the block instead of exiting at once.

    A process that ignores one of them, such as SIGINT in a background job of a script, continues to ignore it.
    """
    interrupt = Interrupt()
    handled = [signum for signum in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(signum) is not signal.SIG_IGN]
    previous = {signum: signal.signal(signum, interrupt.receive) for signum in handled}
    try:
        yield interrupt
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
