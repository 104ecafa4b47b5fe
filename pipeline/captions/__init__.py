"""Caption datasets in any source format, the records made from them, the vocabulary and the token ids."""
