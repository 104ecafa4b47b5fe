"""The attention LSTM: its step, its training and its search."""
