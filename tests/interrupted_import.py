"""A module that is interrupted while it is imported, for `test_startup.py`."""

import os
import signal

try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt as error:
    raise ImportError("an import that loses the interrupt") from error
