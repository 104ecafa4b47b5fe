"""One thin command for each DVC stage."""

import os

# Read by OpenMP when PyTorch is first loaded, so it stands here. A thread that waits for another spins for a while
# before it sleeps; where something else runs on the cores, the usual while makes training up to 20 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
