"""Metrics of a running training, in the files of DVCLive: for `dvc plots show`, DVC's editor extension and the app.

DVCLive itself takes half a second and 75 MiB to import.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifacts import naming, write_atomically

_PLOTS_DIR = Path("plots") / "metrics"
_LATEST_FILE = "metrics.json"


class LiveMetrics:
    """Writer of live metrics, one row per logged step."""

    def __init__(self, folder: Path, global_step: int) -> None:
        """Open a folder of live metrics.

        Args:
            folder: Folder of the metrics.
            global_step: Optimizer steps before this run was resumed. Later rows of the interrupted run are removed, and
                so are damaged rows. 0 empties the folder.
        """
        self._folder = folder
        self._latest: dict[str, float] = {}
        if global_step:
            for path in sorted((folder / _PLOTS_DIR).rglob("*.tsv")):
                if rows := _drop_rows_after(path, global_step):
                    name = path.relative_to(folder / _PLOTS_DIR).with_suffix("").as_posix()
                    self._latest[name] = float(rows[-1].split("\t")[1])
        else:
            shutil.rmtree(folder / _PLOTS_DIR, ignore_errors=True)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Write a row of metrics.

        Args:
            step: Optimizer step in the whole run, from 1.
            row: Values by name, in which `/` separates folders.
        """
        self._latest |= row
        with naming(self._folder):
            for name, value in row.items():
                path = self._folder / _PLOTS_DIR / f"{name}.tsv"
                header = "" if path.exists() else f"step\t{path.stem}\n"
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(f"{header}{step}\t{value}\n")
            text = json.dumps({**_nest(self._latest), "step": step}, indent=4) + "\n"
            # Not `write_atomically`, which waits for the disk.
            (self._folder / _LATEST_FILE).write_text(text, encoding="utf-8")


def _nest(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return a nested object with a level for each `/` of a name."""
    nested: dict[str, Any] = {}
    for name, value in metrics.items():
        *groups, metric = name.split("/")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[metric] = value
    return nested


def _drop_rows_after(path: Path, step: int) -> list[str]:
    """Remove rows after a step and damaged rows from a file of one metric, and return the other rows."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if not lines:
        path.unlink()
        return []
    header, *rows = lines
    rows = [row for row in rows if _is_row_until(row, step)]
    write_atomically(path, "".join([header, *rows]))
    return rows


def _is_row_until(row: str, last_step: int) -> bool:
    """Whether a row is that of a step up to `last_step`, and not damaged."""
    try:
        step, value = row.split("\t")
        return int(step) <= last_step and math.isfinite(float(value))
    except ValueError:
        return False
