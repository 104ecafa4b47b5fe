"""Metrics of a running training, as DVCLive files: for `dvc plots show`, DVC's editor extension and the app."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from dvclive.live import Live
from scmrepo.exceptions import SCMError

from pipeline.artifacts import write_atomically

logger = logging.getLogger("gridcap")

_PLOTS_DIR = Path("plots") / "metrics"
_LATEST_FILE = "metrics.json"


class LiveMetrics:
    """Writer of live metrics, one row per logged step."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        """Open a folder of live metrics.

        Args:
            folder: The folder.
            steps_done: Optimizer steps that a resumed run has done. Later rows of the interrupted run are dropped, and
                so are incomplete rows and files. 0 starts with an empty folder.
        """
        self._live: Live | None = None
        if steps_done:
            for path in sorted((folder / _PLOTS_DIR).rglob("*.tsv")):
                _drop_rows_after(path, steps_done)
            _drop_if_truncated(folder / _LATEST_FILE)
        try:
            self._live = Live(
                str(folder),
                resume=steps_done > 0,
                report=None,
                save_dvc_exp=False,
                dvcyaml=None,
                monitor_system=False,
            )
        except SCMError as error:
            logger.warning("train: no live metrics, because DVCLive cannot open the git repository (%s)", error)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Write metrics as of an optimizer step of the whole run, counted from 1."""
        if self._live is None:
            return
        self._live.step = step
        for name, value in row.items():
            self._live.log_metric(name, value)
        self._live.make_summary()  # type: ignore[no-untyped-call]


def _drop_rows_after(path: Path, step: int) -> None:
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if not lines:
        path.unlink()
        return
    header, *rows = lines
    write_atomically(path, "".join([header, *(row for row in rows if int(row.split("\t")[0]) <= step)]))


def _drop_if_truncated(path: Path) -> None:
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        path.unlink()
