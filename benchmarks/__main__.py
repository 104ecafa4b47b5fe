"""Run benchmarks, all or the named ones, and print their tables.

`scale`, which takes an hour, runs only if it is named; `python -m benchmarks scale --help` describes its arguments.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

import stages  # noqa: F401  # sets GOMP_SPINCOUNT before PyTorch is imported
from benchmarks import one_of

NAMES = (
    "startup",
    "training",
    "threads",
    "refining",
    "searching",
    "encoding",
    "encoders",
    "near_duplicates",
    "reading",
    "memory",
    "predicting",
    "scoring",
    "app",
    "app_memory",
)


def main() -> None:
    """Parse the arguments and run the benchmarks in the order of `NAMES`."""
    if sys.argv[1:2] == ["scale"]:
        import_module("benchmarks.scale").main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", type=one_of(NAMES), metavar="NAME", help=f"one of {', '.join(NAMES)} (default: all)"
    )
    parser.add_argument(
        "--images",
        type=int,
        nargs="+",
        default=[1_000, 20_000],
        metavar="N",
        help="numbers of images in the runs of memory (default: %(default)s)",
    )
    parser.add_argument(
        "--kind", dest="kinds", nargs="+", default=(), metavar="KIND", help="decoders of training (default: all kinds)"
    )
    parser.add_argument("--store", type=Path, metavar="FOLDER", help="feature store that reading reads from the disk")
    arguments = parser.parse_args()
    for name in NAMES:
        if not arguments.names or name in arguments.names:
            # Imported here, since --help needs no PyTorch.
            benchmark = import_module(f"benchmarks.{name}").main
            if name == "memory":
                benchmark(arguments.images)
            elif name == "reading":
                benchmark(arguments.store)
            elif name == "training":
                benchmark(arguments.kinds)
            else:
                benchmark()
            print(flush=True)


if __name__ == "__main__":
    main()
