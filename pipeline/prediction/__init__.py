"""Prediction: from any picture to a caption, with a model folder and nothing else around it."""
