"""Prediction: captions of any image, from a model folder alone."""
