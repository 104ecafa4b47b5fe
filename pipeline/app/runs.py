"""What a training run leaves, while it goes on and in the end, as it stands: it may be written this very moment."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SERIES = Path("plots") / "metrics"

Series = list[tuple[int, float]]
"""Values with the steps, or epochs, after which they were measured."""


@dataclass(frozen=True, kw_only=True)
class LiveRun:
    """Metrics of a training run, by step."""

    changed: float
    """When they were last written, in seconds since 1970."""
    series: Mapping[str, Series]
    """By name of the metric: `train/loss` within epochs, `val_loss` at their ends."""

    @property
    def step(self) -> int:
        """The last step that has left a value."""
        return max((rows[-1][0] for rows in self.series.values() if rows), default=0)


def read_live(folder: Path) -> LiveRun | None:
    """Read the metrics that `train` writes to `folder` while it runs; None where there are none."""
    paths = sorted((folder / _SERIES).rglob("*.tsv"))
    if not paths:
        return None
    return LiveRun(
        changed=max(path.stat().st_mtime for path in paths),
        series={path.relative_to(folder / _SERIES).with_suffix("").as_posix(): _rows(path) for path in paths},
    )


def read_epochs(path: Path) -> Mapping[str, Series]:
    """Read the table of epochs of the last finished run, by name of the metric; empty where there is none."""
    series: dict[str, Series] = {}
    for row in _read_json(path) or []:
        for name, value in row.items():
            if name != "epoch" and value is not None:
                series.setdefault(name, []).append((row["epoch"], value))
    return series


def read_scores(path: Path) -> Mapping[str, Mapping[str, float]]:
    """Read the scores of captions, by subset of the images (`all` is first) and name; empty where there are none."""
    scores = _read_json(path) or {}
    # Of intervals there is a protocol too.
    names = [name for name in scores.get("protocol", {}) if name != "intervals"]
    tables = {"all": scores, **scores.get("subsets", {})}
    found = {subset: {name: table[name] for name in names if name in table} for subset, table in tables.items()}
    return {subset: values for subset, values in found.items() if values}


def _rows(path: Path) -> Series:
    found = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.reader(file, delimiter="\t"):
            try:
                step, value = row
                found.append((int(step), float(value)))
            except ValueError:
                continue  # the head, or a row of which only a part is written yet
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
