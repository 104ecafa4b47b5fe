"""Captions: parsers of datasets, records, tokenizer, vocabulary and token ids."""
