"""Pictures of results: curves of training, and what a captioner looked at for each word.

The same data give the same bytes, in PNG and in SVG. Matplotlib is used without pyplot, so nothing is shown
and no figure outlives its file.

Legend: `T` words, `h` x `w` the grid of regions, `H` x `W` pixels.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from pipeline.artifacts import write_atomically
from pipeline.report.overlay import DIMMED_BRIGHTNESS, GLOW

Point = tuple[float, float]
"""An epoch, and a value after it."""

LABELS = {
    "loss": "loss (nats a word)",
    "accuracy": "token accuracy",
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "cider": "CIDEr-D",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
}
COLORS = {"train": "#8a8f98", "val": "#1f6fb4", "test": "#c8552b"}
INK = "#30343b"
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "grid.linewidth": 0.8,
    "svg.hashsalt": "gridcap",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

MOST_PANELS = 6
"""Panels in a row of an attention strip."""
PANEL = 1.9
"""Longer side of such a panel, in inches."""


def curves(rows: Sequence[Mapping[str, Any]], folder: Path, suffix: Literal[".png", ".svg"]) -> list[Path]:
    """Draw a picture of each quantity in a table of epochs, `<quantity><suffix>` in `folder`; give the paths.

    A row is an epoch: `{"epoch": 3, "train_loss": 2.5, "val_loss": 2.8, "val_bleu4": 0.12}`. What starts with
    the name of a split is drawn, the splits of a quantity in one picture. A value may be missing or None
    where it was not measured; the line then joins its neighbors. The best value of `val` is marked: the
    least loss, the most of anything else.
    """
    lines = lines_by_quantity(rows)
    paths = {quantity: folder / f"{quantity}{suffix}" for quantity in lines}
    for quantity, path in paths.items():
        _curve(lines[quantity], quantity, path)
    return list(paths.values())


def lines_by_quantity(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    """Sort a table of epochs by quantity and split, as `curves` does."""
    lines: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        for column, value in row.items():
            split, _, quantity = column.partition("_")
            if split in COLORS and value is not None:
                lines.setdefault(quantity, {}).setdefault(split, []).append((row["epoch"], value))
    return lines


def best_point(points: Sequence[Point], quantity: str) -> Point:
    """Pick the best epoch of a quantity, the first of several: the least loss, the most of anything else."""
    return (min if quantity == "loss" else max)(points, key=lambda point: point[1])


def attention_strip(
    image: npt.NDArray[np.uint8],
    words: Sequence[str],
    maps: npt.NDArray[np.floating],
    path: Path,
) -> None:
    """Draw a picture [H, W, 3], and once more for each of T words, lit where attention [T, h, w] lay.

    The way of showing is that of Xu et al. 2015 (Show, Attend and Tell). Each word is lit by its own
    strongest region, so panels show where attention lay, not how much more than at another word. `path` ends
    in .png or .svg.

    Raises `ValueError` where words and maps differ in number.
    """
    if len(words) != len(maps):
        raise ValueError(f"{len(words)} words but {len(maps)} attention maps")
    height, width = image.shape[:2]
    panel_width, panel_height = PANEL * width / max(height, width), PANEL * height / max(height, width)
    panels = [("", image), *((word, _lit(image, grid)) for word, grid in zip(words, maps, strict=True))]
    across = min(len(panels), MOST_PANELS)
    down = math.ceil(len(panels) / across)
    gap, title = 0.08, 0.3  # inches
    total_width = across * (panel_width + gap) + gap
    total_height = down * (panel_height + title) + gap
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(total_width, total_height))
        for index, (word, picture) in enumerate(panels):
            row, column = divmod(index, across)
            left = gap + column * (panel_width + gap)
            bottom = total_height - (row + 1) * (panel_height + title)
            axes = figure.add_axes(
                (
                    left / total_width,
                    bottom / total_height,
                    panel_width / total_width,
                    panel_height / total_height,
                )
            )
            axes.imshow(picture, interpolation="lanczos", aspect="auto")
            axes.set_axis_off()
            # A letter is about 0.65 of the font size wide, and a point is 1/72 inch.
            size = min(12.0, 72 * panel_width / (0.65 * max(len(word), 1)))
            axes.set_title(word, fontsize=size, pad=4, parse_math=False)
        _save(figure, path)


def _curve(lines: Mapping[str, list[Point]], quantity: str, path: Path) -> None:
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for split, points in lines.items():
            axes.plot(*zip(*points, strict=True), color=COLORS[split], marker="o", markersize=3, label=split)
        if "val" in lines:
            _mark_best(axes, best_point(lines["val"], quantity), join_relative=quantity == "loss")
        axes.set_xlabel("epoch")
        axes.set_ylabel(LABELS.get(quantity, quantity.replace("_", " ")))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(y=0.15)
        if len(lines) > 1:
            axes.legend(frameon=False)
        _save(figure, path)


def _mark_best(axes: Any, point: Point, join_relative: bool) -> None:
    epoch, value = point
    axes.plot([epoch], [value], marker="o", markersize=8, fillstyle="none", color=COLORS["val"])
    axes.annotate(
        f"{value:.3f}",
        (epoch, value),
        xytext=(0, -9 if join_relative else 9),
        textcoords="offset points",
        ha="center",
        va="top" if join_relative else "bottom",
        fontsize=9,
        color=COLORS["val"],
    )


def _lit(image: npt.NDArray[np.uint8], attention: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """The picture [H, W, 3], lit by attention [h, w]: dim and gray where there is none."""
    height, width = image.shape[:2]
    grid = Image.fromarray(attention.astype(np.float32))
    smooth = np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
    light = smooth / max(float(smooth.max()), np.finfo(np.float32).tiny)
    light = np.clip(light, 0.0, 1.0)[..., np.newaxis]  # bicubic interpolation overshoots below 0
    picture = image / 255
    dim = DIMMED_BRIGHTNESS * picture.mean(axis=-1, keepdims=True)
    bright = 1 - (1 - picture) * (1 - np.array(GLOW))
    lit: npt.NDArray[np.uint8] = (255 * (dim + (bright - dim) * light)).round().astype(np.uint8)
    return lit


def _save(figure: Figure, path: Path) -> None:
    # Dates and versions in the file would make the bytes differ from one day or machine to the next.
    metadata: dict[str, dict[str, None]] = {
        ".png": {"Software": None},
        ".svg": {"Date": None, "Creator": None},
    }
    content, suffix = io.BytesIO(), path.suffix.lower()
    figure.savefig(content, format=suffix[1:], dpi=150, metadata=metadata[suffix])
    write_atomically(path, content.getvalue())
