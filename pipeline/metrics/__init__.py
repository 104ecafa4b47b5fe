"""Caption metrics as functions of tokenized captions, shared by training, evaluation and the command line."""
