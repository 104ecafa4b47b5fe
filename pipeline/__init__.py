"""The library that the stages call; `gridcap` is its public face."""

__version__ = "0.1.0"
