"""Training a decoder on cached grids, resumable to the bit."""
