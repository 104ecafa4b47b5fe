"""Captions: from any source format to records, and from records to token ids."""
