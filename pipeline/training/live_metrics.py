"""Metrics of a running training, as DVCLive files: for `dvc plots show`, DVC's editor extension and the app."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from dvclive.live import Live
from scmrepo.exceptions import SCMError
from typing_extensions import TypedDict

from pipeline.artifacts import Int64, naming, read_json, write_atomically
from pipeline.errors import UserError

logger = logging.getLogger("gridcap")

_PLOTS_DIR = Path("plots") / "metrics"
_LATEST_FILE = "metrics.json"


class LiveMetrics:
    """Writer of live metrics, one row per logged step."""

    def __init__(self, folder: Path, global_step: int) -> None:
        """Open a folder of live metrics.

        Args:
            folder: Folder of the metrics.
            global_step: Optimizer steps before this run was resumed. Later rows of the interrupted run are removed, and
                so are damaged rows and files. 0 empties the folder.
        """
        self._folder = folder
        self._live: Live | None = None
        if global_step:
            for path in sorted((folder / _PLOTS_DIR).rglob("*.tsv")):
                _drop_rows_after(path, global_step)
            _drop_if_damaged(folder / _LATEST_FILE)
        try:
            self._live = Live(
                str(folder),
                resume=global_step > 0,
                report=None,
                save_dvc_exp=False,
                dvcyaml=None,
                monitor_system=False,
            )
        except SCMError as error:
            logger.warning("%s: writing no live metrics: DVCLive cannot open the git repository (%s)", folder, error)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Write a row of metrics.

        Args:
            step: Optimizer step in the whole run, from 1.
            row: Values by name.
        """
        if self._live is None:
            return
        self._live.step = step
        with naming(self._folder):
            for name, value in row.items():
                self._live.log_metric(name, value)
            self._live.make_summary()  # type: ignore[no-untyped-call]


def _drop_rows_after(path: Path, step: int) -> None:
    """Remove rows after a step and a truncated last row from a file of one metric."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if not lines:
        path.unlink()
        return
    header, *rows = lines
    write_atomically(path, "".join([header, *(row for row in rows if _is_row_until(row, step))]))


def _is_row_until(row: str, last_step: int) -> bool:
    """Whether a row is that of a step up to `last_step`, and not damaged."""
    try:
        step, value = row.split("\t")
        return int(step) <= last_step and math.isfinite(float(value))
    except ValueError:
        return False


class _Latest(TypedDict):
    """The key of the latest metrics that DVCLive continues from."""

    step: Int64


def _drop_if_damaged(path: Path) -> None:
    """Remove a JSON file that DVCLive could not read, such as one that a kill left truncated."""
    try:
        read_json(path, _Latest, remedy="")
    except UserError:
        path.unlink(missing_ok=True)
