"""Metrics of training while it runs, in the files of DVCLive that `dvc plots show` and editors draw."""

import csv
from pathlib import Path

from dvclive.live import Live
from scmrepo.exceptions import SCMError

_PLOTS = Path("plots") / "metrics"


class LiveMetrics:
    """Writes rows of metrics of steps; a resumed run goes on where its checkpoint stands."""

    def __init__(self, folder: Path, step: int) -> None:
        """Go on after `step` steps: what an interrupted run wrote beyond them is dropped, as those are taken again."""
        self._live: Live | None = None
        for path in sorted((folder / _PLOTS).rglob("*.tsv")) if step else []:
            _drop_rows_after(path, step)
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
    with path.open(newline="") as file:
        head, *rows = list(csv.reader(file, delimiter="\t")) or [[]]
    kept = [row for row in rows if row and int(row[0]) <= step]
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([head, *kept])
