"""Scores of generated captions, and how they are shown."""
