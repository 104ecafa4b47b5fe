from typing import get_args

from pipeline.captions.records import Split
from pipeline.report.curve_style import METRIC_LABELS, SPLIT_COLORS, curve_label


def test_labels() -> None:
    assert curve_label("loss") == METRIC_LABELS["loss"] == "loss (nats per word)"
    assert curve_label("cider") == "CIDEr-D"
    assert curve_label("learning_rate") == "learning rate"


def test_every_split_has_a_color_of_its_own() -> None:
    assert set(SPLIT_COLORS) == set(get_args(Split))
    assert len(set(SPLIT_COLORS.values())) == 3
