"""Benchmarks: speed, memory and quality, mostly as ratios within one run."""

import argparse
from collections.abc import Callable, Sequence


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Return the `type` of an argument that is one of some names.

    With `choices` instead, argparse of Python 3.11 refuses an empty list of arguments.
    """

    def parse(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(f"unknown name {name}; choose from {', '.join(names)}")
        return name

    return parse
