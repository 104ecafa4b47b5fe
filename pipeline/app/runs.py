"""Read the metrics of training runs for the training page.

A run may be writing these files at the same time, so readers are tolerant: missing and incomplete files and rows are
skipped.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.artifacts import read_json
from pipeline.errors import UserError

T = TypeVar("T")

_LIVE_METRICS = Path("plots") / "metrics"

Series = list[tuple[int, float]]
"""Steps, or epochs, each with the value of a metric after it."""


@dataclass(frozen=True, kw_only=True)
class LiveRun:
    """Metrics of a training run, by step."""

    modified: float
    """Time of the last write, in seconds since 1970."""
    series: Mapping[str, Series]
    """By name of the metric, such as `train/loss` (within epochs) and `val_loss` (at the end of each epoch)."""

    @property
    def step(self) -> int:
        """The last step that any metric was logged at."""
        return max((rows[-1][0] for rows in self.series.values() if rows), default=0)


def read_live(folder: Path) -> LiveRun | None:
    """Read the metrics that a run logs to `folder`; None if there are none."""
    root = folder / _LIVE_METRICS
    paths = sorted(root.rglob("*.tsv"))
    if not paths:
        return None
    return LiveRun(
        modified=max(path.stat().st_mtime for path in paths),
        series={path.relative_to(root).with_suffix("").as_posix(): _read_complete_rows(path) for path in paths},
    )


def read_epochs(path: Path) -> Mapping[str, Series]:
    """Read the metrics of the last finished run by epoch.

    Args:
        path: `results/plots/training.json`.

    Returns:
        The series of each metric; empty if there is no readable file.
    """
    series: dict[str, Series] = {}
    for row in _read_json_tolerantly(path, list[dict[str, int | float | None]]) or []:
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
        Scores by image subset (`all` comes first) and metric; empty if there is no readable file.
    """
    scores = _read_json_tolerantly(path, dict[str, Any]) or {}
    # The intervals have a protocol too.
    metrics = [name for name in scores.get("protocol", {}) if name != "intervals"]
    subsets = {"all": scores, **scores.get("subsets", {})}
    tables = {subset: {name: table[name] for name in metrics if name in table} for subset, table in subsets.items()}
    return {subset: table for subset, table in tables.items() if table}


def _read_complete_rows(path: Path) -> Series:
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.reader(file, delimiter="\t"):
            try:
                step, value = row
                rows.append((int(step), float(value)))
            except ValueError:
                continue  # the header, or a row that is being written
    return rows


def _read_json_tolerantly(path: Path, form: type[T]) -> T | None:
    try:
        return read_json(path, form, remedy="")
    except UserError:
        return None
