"""Metrics of training while it runs, in the files of DVCLive that `dvc plots show` and editors draw."""

import json
from pathlib import Path

from dvclive.live import Live
from scmrepo.exceptions import SCMError

from pipeline.artifacts import write_atomically

_PLOTS = Path("plots") / "metrics"
_LATEST = "metrics.json"


class LiveMetrics:
    """Writes rows of metrics of steps; a resumed run goes on where its checkpoint stands."""

    def __init__(self, folder: Path, step: int) -> None:
        """Go on after `step` steps: what an interrupted run wrote beyond them is dropped, as those are taken again.

        So is what a kill left half written, since DVCLive could not go on from it.
        """
        self._live: Live | None = None
        if step:
            for path in sorted((folder / _PLOTS).rglob("*.tsv")):
                _drop_rows_after(path, step)
            _drop_unless_whole(folder / _LATEST)
        try:
            self._live = Live(
                str(folder),
                resume=step > 0,
                report=None,
                save_dvc_exp=False,
                dvcyaml=None,
                monitor_system=False,
            )
        except SCMError as error:
            print(f"train: no live metrics, since DVCLive cannot use this git repository ({error})", flush=True)

    def log(self, step: int, row: dict[str, float]) -> None:
        """Write metrics as they are after `step` steps of the whole run."""
        if self._live is None:
            return
        self._live.step = step
        for name, value in row.items():
            self._live.log_metric(name, value)
        self._live.make_summary()  # type: ignore[no-untyped-call]


def _drop_rows_after(path: Path, step: int) -> None:
    head, *rows = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] or [""]
    if head:
        write_atomically(path, "".join([head, *(row for row in rows if int(row.split("\t")[0]) <= step)]))
    else:
        path.unlink()


def _drop_unless_whole(path: Path) -> None:
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        return
    except ValueError:
        path.unlink()
