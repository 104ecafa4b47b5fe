"""Run benchmarks, all or those named, and print their tables."""

import argparse
from collections.abc import Callable

import stages  # noqa: F401
from benchmarks import encoding, memory, reading, training

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("names", nargs="*", choices=["training", "encoding", "reading", "memory"])
parser.add_argument("--images", type=int, nargs="+", default=memory.IMAGES, metavar="N", help="in the runs of memory")
arguments = parser.parse_args()

benchmarks: dict[str, Callable[[], None]] = {
    "training": training.main,
    "encoding": encoding.main,
    "reading": reading.main,
    "memory": lambda: memory.main(arguments.images),
}
for name, main in benchmarks.items():
    if not arguments.names or name in arguments.names:
        main()
        print(flush=True)
