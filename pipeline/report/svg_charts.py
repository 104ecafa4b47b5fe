"""Curves of training as geometry, for a page that draws them itself in its own colors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from pipeline.report.figures import LABELS, best_point, lines_by_quantity

WIDTH, HEIGHT = 320, 190
"""Of a chart, in its own units."""
LEFT, RIGHT, TOP, BOTTOM = 40, WIDTH - 8, 10, HEIGHT - 24
"""Edges of the part that lines are drawn in; ticks are written to the left of it and below."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One split's values."""

    split: str
    points: tuple[tuple[float, float], ...]
    """x and y of each epoch, in the chart's units."""
    best: tuple[float, float, str] | None
    """x, y and value of the best epoch of `val`."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One quantity over the epochs."""

    title: str
    lines: tuple[Line, ...]
    epochs: tuple[tuple[float, str], ...]
    """x and text of each tick."""
    values: tuple[tuple[float, str], ...]
    """y and text of each tick."""


def charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Lay out a chart of each quantity in a table of epochs, as `plots.curves` takes it."""
    return [_chart(quantity, lines) for quantity, lines in lines_by_quantity(rows).items()]


def _chart(quantity: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> Chart:
    epochs = [epoch for points in lines.values() for epoch, _ in points]
    values = [value for points in lines.values() for _, value in points]
    # One value alone has no span to lay out.
    room = 0.1 if min(values) == max(values) else 0.0
    # Ticks that hold all values between them, so that the outermost end the axis.
    ticks = _ticks(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]), min(values) - room, max(values) + room)
    first, last = min(epochs), max(epochs)

    def x(epoch: float) -> float:
        share = (epoch - first) / (last - first) if last > first else 0.5
        return round(LEFT + share * (RIGHT - LEFT), 1)

    def y(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return round(BOTTOM - share * (BOTTOM - TOP), 1)

    def line(split: str, points: Sequence[tuple[float, float]]) -> Line:
        epoch, value = best_point(points, quantity)
        return Line(
            split=split,
            points=tuple((x(epoch), y(value)) for epoch, value in points),
            best=(x(epoch), y(value), f"{value:.3f}") if split == "val" else None,
        )

    shown = [epoch for epoch in _ticks(MaxNLocator(nbins=6, integer=True), first, last) if first <= epoch <= last]
    return Chart(
        title=LABELS.get(quantity, quantity.replace("_", " ")),
        lines=tuple(line(split, points) for split, points in lines.items()),
        epochs=tuple((x(epoch), f"{epoch:g}") for epoch in shown),
        values=tuple((y(value), f"{value:g}") for value in ticks),
    )


def _ticks(locator: MaxNLocator, low: float, high: float) -> list[float]:
    # Rounded, since steps add up to 0.30000000000000004.
    return [round(float(tick), 9) for tick in locator.tick_values(low, high)]
