"""Benchmarks: speed, memory and quality, mostly as ratios within one run."""
