"""Labels and colors of training curves, for figures, the report and the app."""

METRIC_LABELS: dict[str, str] = {
    "loss": "loss (nats per word)",
    "accuracy": "token accuracy",
    "attention_entropy": "attention entropy (nats)",
    "bleu4": "BLEU-4",
    "cider": "CIDEr-D",
}
"""Axis label of each metric."""

SPLIT_COLORS: dict[str, str] = {"train": "#8a8f98", "val": "#1f6fb4", "test": "#c8552b"}
"""Line color of each split."""

DARK_SPLIT_COLORS: dict[str, str] = {"train": "#8f959f", "val": "#6db3ee", "test": "#ee8b62"}
"""Line color of each split on a dark background."""


def curve_label(metric: str) -> str:
    """Return the label of a metric: that of `METRIC_LABELS`, or the name with spaces."""
    return METRIC_LABELS.get(metric, metric.replace("_", " "))


def split_colors_css() -> str:
    """Return a style sheet that sets the variables `--train`, `--val` and `--test` to the colors of the splits."""
    light, dark = (
        " ".join(f"--{split}: {color};" for split, color in colors.items())
        for colors in (SPLIT_COLORS, DARK_SPLIT_COLORS)
    )
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
