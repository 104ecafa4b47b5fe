"""One thin command for each DVC stage."""

import os

# OpenMP reads this when PyTorch is first imported. By default, waiting threads spin so long that training is up to 20
# times slower on cores that are shared with other processes.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
