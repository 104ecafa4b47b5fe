"""Cross-entropy training of the decoder on cached grids; a resumed run gives the same bytes."""
