"""The training page: live metrics of the current run, and results of the last finished run."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from pipeline.app.runs import LiveRun, Series, read_epochs, read_live, read_scores
from pipeline.report.curve_style import SPLIT_COLORS, curve_label

if TYPE_CHECKING:
    import altair as alt

RESULTS = Path("results")
"""Results of `train` and `evaluate`, in the folder in which the app was started."""
_LIVE_METRICS = RESULTS / "live"
_SCORES = RESULTS / "metrics" / "scores.json"
_EPOCHS = RESULTS / "plots" / "training.json"

Curves = Mapping[str, Mapping[str, str]]
"""Name of the series of each curve, by metric of the chart, then by split."""

_LIVE_CURVES: Curves = {
    "loss": {"train": "train/loss", "val": "val_loss"},
    "cider": {"val": "val_cider"},
    "bleu4": {"val": "val_bleu4"},
    "learning_rate": {"train": "train/learning_rate"},
    "gradient_norm": {"train": "train/gradient_norm"},
    "attention_entropy": {"train": "train/attention_entropy"},
}
_EPOCH_CURVES: Curves = {
    "loss": {"train": "train_loss", "val": "val_loss"},
    "cider": {"val": "val_cider"},
    "bleu4": {"val": "val_bleu4"},
}
_REFRESH_SECONDS = 2.0
_CHARTS_PER_ROW = 3
_MAX_POINTS = 400
"""Maximum points of a curve; more would be invisible and slow."""
_STALE_AFTER = 60.0
"""Seconds without a new value after which a run is no longer shown as running."""


def page() -> None:
    """Draw the page."""
    _show_current_run()
    _show_last_run()


@st.fragment(run_every=_REFRESH_SECONDS)
def _show_current_run() -> None:
    st.subheader("Current run", anchor=False)
    run = read_live(_LIVE_METRICS)
    if run is None:
        st.info(
            f"There are no metrics in `{_LIVE_METRICS}` of the folder in which the app was started. "
            "Start a run there with `dvc repro`, and this page will show it."
        )
        return
    _show_status(run)
    _draw_charts(_LIVE_CURVES, run.series, "step")


def _show_status(run: LiveRun) -> None:
    age = time.time() - run.modified
    st.caption(":green[●] running" if age < _STALE_AFTER else f"○ last update {_format_duration(age)} ago")
    tiles = {"Step": f"{run.step:,}"}
    if losses := _values(run, "train/loss"):
        tiles["Loss"] = f"{losses[-1]:.3f}"
    if cider_scores := _values(run, "val_cider"):
        tiles["Best CIDEr-D"] = f"{max(cider_scores):.3f}"
    if speeds := _values(run, "train/captions_per_second"):
        tiles["Captions per second"] = f"{speeds[-1]:,.0f}"
    for column, (label, value) in zip(st.columns(len(tiles)), tiles.items(), strict=True):
        column.metric(label, value)


def _values(run: LiveRun, metric: str) -> list[float]:
    return [value for _, value in run.series.get(metric, [])]


def _show_last_run() -> None:
    scores = read_scores(_SCORES)
    epochs = read_epochs(_EPOCHS)
    if not scores and not epochs:
        return
    st.subheader("Last finished run", anchor=False)
    if scores:
        metrics = list(dict.fromkeys(metric for table in scores.values() for metric in table))
        columns = {metric: [_format_score(table.get(metric)) for table in scores.values()] for metric in metrics}
        st.table({"images": list(scores)} | columns)
        st.caption(f"The protocol of each score is in `{_SCORES}`.")
    _draw_charts(_EPOCH_CURVES, epochs, "epoch")


def _draw_charts(curves: Curves, series: Mapping[str, Series], unit: str) -> None:
    """Draw a chart of each metric that has values.

    Args:
        curves: Metrics to draw.
        series: Values by name of the series.
        unit: Label of the x axis, `step` or `epoch`.
    """
    charts = []
    for metric, splits in curves.items():
        lines = {split: series[name] for split, name in splits.items() if series.get(name)}
        if lines:
            charts.append(_chart(curve_label(metric), lines, unit))
    for start in range(0, len(charts), _CHARTS_PER_ROW):
        row = charts[start : start + _CHARTS_PER_ROW]
        for column, chart in zip(st.columns(_CHARTS_PER_ROW), row, strict=False):
            column.altair_chart(chart)


def _chart(title: str, lines: Mapping[str, Series], unit: str) -> "alt.Chart":
    import altair as alt  # imported here because the captioning page does not need it

    rows = [
        {unit: step, "value": value, "split": split}
        for split, points in lines.items()
        for step, value in [*points[: -1 : len(points) // _MAX_POINTS + 1], points[-1]]
    ]
    colors = alt.Scale(domain=list(lines), range=[SPLIT_COLORS[split] for split in lines])
    legend = alt.Legend(title=None, orient="top-right") if len(lines) > 1 else None
    chart = alt.Chart(alt.InlineData(values=rows), title=title, height=220)
    # A line through a single point is invisible.
    has_single_point = any(len(points) == 1 for points in lines.values())
    line_chart: alt.Chart = chart.mark_line(strokeWidth=1.8, point=has_single_point).encode(
        alt.X(unit, type="quantitative").axis(grid=False, tickCount=5, format="~s"),
        alt.Y("value", type="quantitative").scale(zero=False).title(None),
        alt.Color("split", type="nominal", scale=colors, legend=legend),
    )
    return line_chart


def _format_score(score: float | None) -> str:
    return "–" if score is None else f"{score:.3f}"


def _format_duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
