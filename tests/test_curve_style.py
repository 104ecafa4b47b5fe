from typing import get_args

import pytest

from pipeline.captions.records import Split
from pipeline.report.curve_style import DARK_SPLIT_COLORS, METRIC_LABELS, SPLIT_COLORS, curve_label, split_colors_css


def test_labels() -> None:
    assert curve_label("loss") == METRIC_LABELS["loss"] == "loss (nats per word)"
    assert curve_label("cider") == "CIDEr-D"
    assert curve_label("learning_rate") == "learning rate"


@pytest.mark.parametrize("colors", [SPLIT_COLORS, DARK_SPLIT_COLORS])
def test_splits_have_distinct_colors(colors: dict[str, str]) -> None:
    assert set(colors) == set(get_args(Split))
    assert len(set(colors.values())) == 3


def test_style_sheet_has_light_and_dark_colors() -> None:
    light, dark = split_colors_css().splitlines()
    assert light == ":root { " + " ".join(f"--{split}: {color};" for split, color in SPLIT_COLORS.items()) + " }"
    assert dark.startswith("@media (prefers-color-scheme: dark) {")
    assert all(f"--{split}: {color};" in dark for split, color in DARK_SPLIT_COLORS.items())
