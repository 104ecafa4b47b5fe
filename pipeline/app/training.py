"""The page of the current training run, which draws itself anew while the run goes on, and of the last scores."""

import time
from collections.abc import Mapping
from pathlib import Path

import altair as alt
import streamlit as st

from pipeline.app.runs import LiveRun, Series, read_epochs, read_live, read_scores

RESULTS = Path("results")

_COLORS = {"train": "#8a8f98", "val": "#c8552b"}
_CURVES = {
    "Loss, nats a word": {"train": "train/loss", "val": "val_loss"},
    "CIDEr-D of validation captions": {"val": "val_cider"},
    "BLEU-4 of validation captions": {"val": "val_bleu4"},
    "Learning rate": {"train": "train/learning_rate"},
    "Norm of the gradient": {"train": "train/gradient_norm"},
    "Entropy of attention, nats": {"train": "train/attention_entropy"},
}
_EPOCH_CURVES = {
    "Loss, nats a word": {"train": "train_loss", "val": "val_loss"},
    "CIDEr-D": {"val": "val_cider"},
    "BLEU-4": {"val": "val_bleu4"},
}
_MOST_POINTS = 400
"""Of a curve; more are not seen, and slow the page down."""
_QUIET = 60.0
"""Seconds without a value after which a run is said to have stopped."""


def page() -> None:
    """Draw the page."""
    _current()
    _finished()


@st.fragment(run_every=2.0)
def _current() -> None:
    st.subheader("Current run", anchor=False)
    run = read_live(RESULTS / "live")
    if run is None:
        st.info(
            f"No run has left metrics in `{RESULTS / 'live'}`, below the folder that the app was started in. "
            "`dvc repro` starts one; this page then follows it."
        )
        return
    _state(run)
    _draw(_CURVES, run.series, "step")


def _state(run: LiveRun) -> None:
    silent = time.time() - run.changed
    st.caption(":green[●] running" if silent < _QUIET else f"○ nothing new for {_told(silent)}")
    tiles = {"Step": f"{run.step:,}"}
    for label, name, form in (
        ("Loss", "train/loss", ".3f"),
        ("Best CIDEr-D", "val_cider", ".3f"),
        ("Captions a second", "train/captions_per_second", ",.0f"),
    ):
        if values := [value for _, value in run.series.get(name, [])]:
            tiles[label] = format(max(values) if label.startswith("Best") else values[-1], form)
    for column, (label, value) in zip(st.columns(len(tiles)), tiles.items(), strict=True):
        column.metric(label, value)


def _finished() -> None:
    scores = read_scores(RESULTS / "metrics" / "scores.json")
    epochs = read_epochs(RESULTS / "plots" / "training.json")
    if not scores and not epochs:
        return
    st.subheader("Last finished run", anchor=False)
    if scores:
        names = list(dict.fromkeys(name for values in scores.values() for name in values))
        cells = {name: [_rounded(values.get(name)) for values in scores.values()] for name in names}
        st.table({"images": list(scores)} | cells)
        st.caption("`results/metrics/scores.json` has the protocol of each score.")
    _draw(_EPOCH_CURVES, epochs, "epoch")


def _draw(curves: Mapping[str, Mapping[str, str]], series: Mapping[str, Series], unit: str) -> None:
    shown = {
        title: {split: series[name] for split, name in lines.items() if series.get(name)}
        for title, lines in curves.items()
    }
    shown = {title: lines for title, lines in shown.items() if lines}
    for start in range(0, len(shown), 3):
        for column, (title, lines) in zip(st.columns(3), list(shown.items())[start : start + 3], strict=False):
            column.altair_chart(_chart(title, lines, unit))


def _chart(title: str, lines: Mapping[str, Series], unit: str) -> alt.Chart:
    rows = [
        {unit: place, "value": value, "split": split}
        for split, points in lines.items()
        for place, value in [*points[: -1 : len(points) // _MOST_POINTS + 1], points[-1]]
    ]
    colors = alt.Scale(domain=list(lines), range=[_COLORS[split] for split in lines])
    legend = alt.Legend(title=None, orient="top-right") if len(lines) > 1 else None
    chart = alt.Chart(alt.InlineData(values=rows), title=title, height=220)
    lone = any(len(points) == 1 for points in lines.values())
    drawn: alt.Chart = chart.mark_line(strokeWidth=1.8, point=lone).encode(
        alt.X(unit, type="quantitative").axis(grid=False, tickCount=5, format="~s"),
        alt.Y("value", type="quantitative").scale(zero=False).title(None),
        alt.Color("split", type="nominal", scale=colors, legend=legend),
    )
    return drawn


def _rounded(score: float | None) -> str:
    return "–" if score is None else f"{score:.3f}"


def _told(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
