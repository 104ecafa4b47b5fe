"""The library behind the stages. `gridcap.py` is its public API."""

__version__ = "0.1.0"
