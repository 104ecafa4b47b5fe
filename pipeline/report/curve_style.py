"""Labels and colors of training curves, for figures, the report and the app."""

METRIC_LABELS: dict[str, str] = {
    "loss": "loss (nats per word)",
    "accuracy": "token accuracy",
    "attention_entropy": "attention entropy (nats)",
    "bleu1": "BLEU-1",
    "bleu2": "BLEU-2",
    "bleu3": "BLEU-3",
    "bleu4": "BLEU-4",
    "cider": "CIDEr-D",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
}
"""Axis label of each metric."""

SPLIT_COLORS: dict[str, str] = {"train": "#8a8f98", "val": "#1f6fb4", "test": "#c8552b"}
"""Line color of each split."""


def curve_label(metric: str) -> str:
    """Return the axis label of a metric; the name itself, with spaces, for other metrics."""
    return METRIC_LABELS.get(metric, metric.replace("_", " "))
