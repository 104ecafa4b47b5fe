"""Evaluation of generated captions: scores, human agreement, diversity, and scores of the embedded scenes."""
