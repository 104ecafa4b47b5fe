"""Caption generation: beam search and sampling over any decoder, ensembles, and the files of generated captions."""
