"""Layout of training curves in SVG coordinates, which the report page draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from pipeline.report.curve_style import curve_label
from pipeline.report.figures import best_point, lines_by_metric

WIDTH, HEIGHT = 320, 190
"""Size of a chart, in SVG units."""
LEFT, RIGHT, TOP, BOTTOM = 40, WIDTH - 8, 10, HEIGHT - 24
"""Edges of the plot area, in SVG units. Tick labels are left of it and below it."""
_MIN_RANGE = 1e-6
"""Values in a smaller range are drawn as a constant curve: ticks have 9 decimals."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """The curve of one split."""

    split: str
    """`train`, `val` or `test`."""
    points: tuple[tuple[float, float], ...]
    """x and y of each epoch."""
    best: tuple[float, float, str] | None
    """x, y and label of the best epoch of `val`; None for other splits."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One metric over the epochs."""

    title: str
    """Label of the metric."""
    lines: tuple[Line, ...]
    """A line per split."""
    x_ticks: tuple[tuple[float, str], ...]
    """x and label of each tick."""
    y_ticks: tuple[tuple[float, str], ...]
    """y and label of each tick."""


def layout_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Lay out one chart per metric; `rows` are those of `figures.draw_curves`."""
    return [_layout_chart(metric, lines) for metric, lines in lines_by_metric(rows).items()]


def _layout_chart(metric: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> Chart:
    epochs = [epoch for points in lines.values() for epoch, _ in points]
    values = [value for points in lines.values() for _, value in points]
    margin = 0.1 if max(values) - min(values) < _MIN_RANGE else 0.0
    # The outermost ticks enclose all values and end the axis.
    ticks = _ticks(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]), min(values) - margin, max(values) + margin)
    first, last = min(epochs), max(epochs)

    def x(epoch: float) -> float:
        fraction = (epoch - first) / (last - first) if last > first else 0.5
        return round(LEFT + fraction * (RIGHT - LEFT), 1)

    def y(value: float) -> float:
        fraction = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return round(BOTTOM - fraction * (BOTTOM - TOP), 1)

    def line(split: str, points: Sequence[tuple[float, float]]) -> Line:
        epoch, value = best_point(points, metric)
        return Line(
            split=split,
            points=tuple((x(epoch), y(value)) for epoch, value in points),
            best=(x(epoch), y(value), f"{value:.3f}") if split == "val" else None,
        )

    epoch_ticks = [tick for tick in _ticks(MaxNLocator(nbins=6, integer=True), first, last) if first <= tick <= last]
    return Chart(
        title=curve_label(metric),
        lines=tuple(line(split, points) for split, points in lines.items()),
        x_ticks=tuple((x(tick), f"{tick:g}") for tick in epoch_ticks),
        y_ticks=tuple((y(tick), f"{tick:g}") for tick in ticks),
    )


def _ticks(locator: MaxNLocator, low: float, high: float) -> list[float]:
    # Matplotlib's steps add up to values such as 0.30000000000000004.
    return [round(float(tick), 9) for tick in locator.tick_values(low, high)]
