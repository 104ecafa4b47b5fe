"""Parsers of caption files, one module per format, and the checks that turn a dataset into records."""
