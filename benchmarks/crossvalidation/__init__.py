"""Cross-validation on photographs: `python -m benchmarks.crossvalidation`."""
