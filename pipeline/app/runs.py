"""Read the metrics of training runs for the training page.

A run may be writing these files at the same time, so the readers skip missing and incomplete files and rows.
"""

import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

from pydantic import FiniteFloat

from pipeline.artifacts import Int64, read_json
from pipeline.errors import UserError
from pipeline.metrics.caption_scores import CORPUS_SCORES

T = TypeVar("T")

_LIVE_METRICS = Path("plots") / "metrics"

Series = list[tuple[int, float]]
"""Values of a metric: pairs of step (or epoch) and the value after it."""


@dataclass(frozen=True, kw_only=True)
class LiveRun:
    """Metrics of a training run, by step."""

    modified: float
    """Time of the last write, in seconds since 1970."""
    series: Mapping[str, Series]
    """Series by name of the metric, such as `train/loss` (within epochs) and `val_loss` (after each epoch)."""

    @property
    def step(self) -> int:
        """Last step at which a metric was logged."""
        return max((rows[-1][0] for rows in self.series.values() if rows), default=0)


def read_live(folder: Path) -> LiveRun | None:
    """Read the metrics that `train` logs.

    Args:
        folder: `results/live`.

    Returns:
        The metrics, or None if there are none.
    """
    root = folder / _LIVE_METRICS
    modified = []
    series: dict[str, Series] = {}
    # Unlike Path.rglob, glob skips folders that are deleted while they are listed.
    for name in sorted(glob("**/*.tsv", root_dir=root, recursive=True)):
        path = root / name
        with suppress(FileNotFoundError, IsADirectoryError):
            modified.append(path.stat().st_mtime)
            series[name.removesuffix(".tsv")] = _read_complete_rows(path)
    return LiveRun(modified=max(modified), series=series) if series else None


def read_epochs(path: Path) -> Mapping[str, Series]:
    """Read the metrics of each epoch of the last finished run.

    Args:
        path: `results/plots/training.json`.

    Returns:
        The series of each metric; empty if there is no readable file.
    """
    series: dict[str, Series] = {}
    for row in _read_json_tolerantly(path, list[dict[str, Int64 | FiniteFloat | None]]) or []:
        epoch = row.pop("epoch", None)
        for name, value in row.items():
            if epoch is not None and value is not None:
                series.setdefault(name, []).append((int(epoch), value))
    return series


def read_scores(path: Path) -> Mapping[str, Mapping[str, float]]:
    """Read the scores of the generated captions.

    Args:
        path: `results/metrics/scores.json`.

    Returns:
        Scores by image subset (`all` is first), then by metric; empty if there is no readable file.
    """
    scores = _read_json_tolerantly(path, dict[str, Any]) or {}
    subsets = scores.get("subsets")
    tables = {"all": scores} | (subsets if isinstance(subsets, dict) else {})
    scores_of = {subset: _finite_scores(table) for subset, table in tables.items()}
    return {subset: table for subset, table in scores_of.items() if table}


def _finite_scores(table: object) -> dict[str, float]:
    if not isinstance(table, dict):
        return {}
    values = {metric: table.get(metric) for metric in CORPUS_SCORES}
    return {
        metric: value
        for metric, value in values.items()
        if isinstance(value, float | int) and abs(value) <= sys.float_info.max
    }


def _read_complete_rows(path: Path) -> Series:
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            fields = line.split("\t")
            step, value = int(fields[0]), float(fields[1])
        except (ValueError, IndexError):
            continue  # the header, or a row that is being written
        if 0 <= step < 2**53 and math.isfinite(value):  # JavaScript draws them
            rows.append((step, value))
    return rows


def _read_json_tolerantly(path: Path, form: type[T]) -> T | None:
    try:
        return read_json(path, form, remedy="")
    except UserError:
        return None
