"""Run every benchmark and print its table."""

import stages  # noqa: F401
from benchmarks import training

training.main()
