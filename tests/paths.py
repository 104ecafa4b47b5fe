"""Folders that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The repository."""
REAL = ROOT.parent / "shared" / "real"
"""Real photographs, captions and weights; tests that need them are skipped where the folder is missing."""
