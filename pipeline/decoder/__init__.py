"""The decoder: a soft attention LSTM, its reference implementation, and the model folder."""
