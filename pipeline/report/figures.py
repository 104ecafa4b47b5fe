"""Figures of a run: training curves, and the attention of each word of a caption.

The same data give the same bytes, in PNG and in SVG. Figures are drawn without pyplot, so no window opens and no figure
remains in memory.

Legend: `T` words, `h` x `w` grid of regions, `H` x `W` pixels.
"""

import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator
from PIL import Image

from pipeline.artifacts import write_atomically
from pipeline.report.curve_style import SPLIT_COLORS, curve_label
from pipeline.report.overlay import DIMMED_BRIGHTNESS, GLOW, sentinel_label, sentinel_weights

logger = logging.getLogger("gridcap")

Point = tuple[float, float]
"""An epoch, and the value of a metric after it."""

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

MAX_COLUMNS = 6
"""Maximum panels in a row of an attention strip."""
PANEL_SIZE = 1.9
"""Longer side of a panel, in inches."""
PANEL_GAP, TITLE_HEIGHT = 0.08, 0.3
"""Space between panels and above each panel, in inches."""
TITLE_PAD = 4 / 72
"""Space between a panel and its title, in inches."""


def draw_curves(rows: Sequence[Mapping[str, Any]], folder: Path, suffix: Literal[".png", ".svg"]) -> list[Path]:
    """Draw one figure per metric, `<metric><suffix>`, with a line per split.

    The best value of `val` is marked: the lowest loss, the highest of any other metric.

    Args:
        rows: Metrics of each epoch, such as `{"epoch": 3, "train_loss": 2.5, "val_loss": 2.8, "val_bleu4": 0.12}`. Keys
            that start with a split are drawn. Missing and None values are skipped; the line connects the values around
            them.
        folder: Output folder.
        suffix: File format.

    Returns:
        The paths of the figures.
    """
    lines = lines_by_metric(rows)
    paths = {metric: folder / f"{metric}{suffix}" for metric in lines}
    for metric, path in paths.items():
        _draw_curve(lines[metric], metric, path)
    return list(paths.values())


def lines_by_metric(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    """Group the metrics of epochs by metric, then by split; `rows` are those of `draw_curves`."""
    lines: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        for key, value in row.items():
            split, _, metric = key.partition("_")
            if split in SPLIT_COLORS and value is not None:
                lines.setdefault(metric, {}).setdefault(split, []).append((row["epoch"], value))
    return lines


def best_point(points: Sequence[Point], metric: str) -> Point:
    """Return the first epoch with the best value: the lowest of `loss`, the highest of any other metric."""
    return (min if metric == "loss" else max)(points, key=lambda point: point[1])


def attention_strip(
    image: npt.NDArray[np.uint8],
    words: Sequence[str],
    attention: npt.NDArray[np.floating],
    path: Path,
) -> None:
    """Draw an image, then one panel per word with the attention of the word highlighted, as in Xu et al. 2015.

    Each panel is scaled to the maximum of its word, so brightness is not comparable between words. If the decoder has a
    visual sentinel, its weight stands behind the word.

    Args:
        image: RGB image, [H, W, 3].
        words: T words.
        attention: Attention weights of each word, [T, h, w].
        path: Output file, PNG or SVG by its suffix.

    Raises:
        ValueError: The numbers of words and attention maps differ.
    """
    if len(words) != len(attention):
        raise ValueError(f"{len(words)} words but {len(attention)} attention maps")
    height, width = image.shape[:2]
    panel_width, panel_height = PANEL_SIZE * width / max(height, width), PANEL_SIZE * height / max(height, width)
    labels = map(sentinel_label, sentinel_weights(attention).tolist())
    titles = [" · ".join(filter(None, pair)) for pair in zip(words, labels, strict=True)]
    highlights = (_highlight(image, weights) for weights in attention)
    panels = [("", image), *zip(titles, highlights, strict=True)]
    num_columns = min(len(panels), MAX_COLUMNS)
    num_rows = math.ceil(len(panels) / num_columns)
    total_width = num_columns * (panel_width + PANEL_GAP) + PANEL_GAP
    total_height = num_rows * (panel_height + TITLE_HEIGHT) + PANEL_GAP
    with _style_for("".join(words)):
        figure = Figure(figsize=(total_width, total_height))
        # One for all panels, in inches: Matplotlib lays out the ticks of each, also where they are not shown.
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, total_width), ylim=(0, total_height))
        axes.set_axis_off()
        for index, (title, panel) in enumerate(panels):
            row, column = divmod(index, num_columns)
            left = PANEL_GAP + column * (panel_width + PANEL_GAP)
            bottom = total_height - (row + 1) * (panel_height + TITLE_HEIGHT)
            top = bottom + panel_height
            axes.imshow(panel, interpolation="lanczos", aspect="auto", extent=(left, left + panel_width, bottom, top))
            # A letter is about 0.65 of the font size wide, and a point is 1/72 inch.
            font_size = min(12.0, 72 * panel_width / (0.65 * max(len(title), 1)))
            center = left + panel_width / 2
            axes.text(center, top + TITLE_PAD, title, ha="center", fontsize=font_size, parse_math=False)
        _save(figure, path)


@contextmanager
def _style_for(text: str) -> Iterator[None]:
    """Use the style of this module with a font for scripts that the default font lacks, such as Han or Thai."""
    characters = {ord(character) for character in text if not character.isspace()}
    default_font = matplotlib.rcParamsDefault["font.sans-serif"][0]
    families = [default_font]
    if missing := characters - _characters(font_manager.findfont(default_font)):
        fonts = ((font.name, font.fname) for font in font_manager.fontManager.ttflist)
        names = (name for name, path in sorted(fonts) if "Last Resort" not in name and missing <= _characters(path))
        if (name := next(names, None)) is None:
            _warn_of_missing_font(chr(min(missing)))
        else:
            families.append(name)
    with matplotlib.style.context(["default", STYLE | {"font.family": families}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # reported above, once
        yield


@cache
def _characters(font: str) -> frozenset[int]:
    """Return the code points that a font file has."""
    try:
        return frozenset(FT2Font(font).get_charmap())
    except (OSError, RuntimeError):  # removed since Matplotlib listed it, or of another format
        return frozenset()


@cache
def _warn_of_missing_font(character: str) -> None:
    logger.warning("attention plots: no installed font has all characters of a caption, such as %s", character)


def _draw_curve(lines: Mapping[str, list[Point]], metric: str, path: Path) -> None:
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for split, points in lines.items():
            axes.plot(*zip(*points, strict=True), color=SPLIT_COLORS[split], marker="o", markersize=3, label=split)
        if "val" in lines:
            _mark_best(axes, best_point(lines["val"], metric), label_below=metric == "loss")
        axes.set_xlabel("epoch")
        axes.set_ylabel(curve_label(metric))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(y=0.15)
        if len(lines) > 1:
            axes.legend(frameon=False)
        _save(figure, path)


def _mark_best(axes: Any, point: Point, label_below: bool) -> None:
    epoch, value = point
    axes.plot([epoch], [value], marker="o", markersize=8, fillstyle="none", color=SPLIT_COLORS["val"])
    axes.annotate(
        f"{value:.3f}",
        (epoch, value),
        xytext=(0, -9 if label_below else 9),
        textcoords="offset points",
        ha="center",
        va="top" if label_below else "bottom",
        fontsize=9,
        color=SPLIT_COLORS["val"],
    )


def _highlight(image: npt.NDArray[np.uint8], attention: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Highlight attention [h, w] in an image [H, W, 3]: dimmed gray without attention, bright colors with it."""
    height, width = image.shape[:2]
    grid = Image.fromarray(attention.astype(np.float32))
    smooth = np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))  # [H, W]
    weight = smooth / max(float(smooth.max()), np.finfo(np.float32).tiny)
    weight = np.clip(weight, 0.0, 1.0)[..., np.newaxis]  # [H, W, 1]; bicubic interpolation overshoots below 0
    pixels = image / 255
    dim = DIMMED_BRIGHTNESS * pixels.mean(axis=-1, keepdims=True)  # [H, W, 1]
    bright = 1 - (1 - pixels) * (1 - np.array(GLOW))
    highlighted: npt.NDArray[np.uint8] = (255 * (dim + (bright - dim) * weight)).round().astype(np.uint8)
    return highlighted


def _save(figure: Figure, path: Path) -> None:
    # Dates and versions would make the bytes differ between days and machines. Pillow's default compression level, 6,
    # takes three times as long as 4 for files that are 3% smaller.
    options: dict[str, dict[str, Any]] = {
        ".png": {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 4}},
        ".svg": {"metadata": {"Date": None, "Creator": None}},
    }
    content, suffix = io.BytesIO(), path.suffix.lower()
    figure.savefig(content, format=suffix[1:], dpi=150, **options[suffix])
    write_atomically(path, content.getvalue())
