"""One thin command for each DVC stage."""

import os
import sys

from pipeline.startup import handle_interrupts

# Python sets this name while it locates the module of `python -m`. Other importers keep their handler of Ctrl-C.
if sys.argv[0] == "-m":
    handle_interrupts()

# OpenMP reads this when PyTorch is first imported. By default, waiting threads spin so long that training is up to 20
# times slower on cores that are shared with other processes.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
