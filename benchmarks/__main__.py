"""Run benchmarks, all or those named, and print their tables."""

import argparse
from collections.abc import Callable

import stages  # noqa: F401
from benchmarks import encoding, memory, predicting, reading, scoring, searching, training

NAMES = ["training", "searching", "predicting", "scoring", "encoding", "reading", "memory"]
parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("names", nargs="*", choices=NAMES)
parser.add_argument(
    "--images", type=int, nargs="+", default=memory.NUM_IMAGES, metavar="N", help="in the runs of memory"
)
arguments = parser.parse_args()

benchmarks: dict[str, Callable[[], None]] = {
    "training": training.main,
    "searching": searching.main,
    "encoding": encoding.main,
    "reading": reading.main,
    "memory": lambda: memory.main(arguments.images),
    "predicting": predicting.main,
    "scoring": scoring.main,
}
for name, main in benchmarks.items():
    if not arguments.names or name in arguments.names:
        main()
        print(flush=True)
