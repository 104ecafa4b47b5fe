"""Caption metrics as pure functions of tokens: training, evaluation and the command line share them."""
