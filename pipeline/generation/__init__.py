"""Caption generation: search over any decoder, ensembles, and the files that captions are stored in."""
