import pytest

from pipeline.report.svg_charts import BOTTOM, TOP, layout_charts


def test_the_layout_worked_by_hand():
    rows = [
        {"epoch": 1, "train_loss": 4.0, "val_loss": 5.0, "val_bleu4": None},
        {"epoch": 2, "train_loss": 2.0, "val_loss": 3.0, "val_bleu4": 0.125},
    ]
    loss, bleu4 = layout_charts(rows)
    assert (loss.title, bleu4.title) == ("loss (nats per word)", "BLEU-4")
    assert loss.y_ticks[0] == (166.0, "2")
    assert loss.y_ticks[-1] == (10.0, "5")
    assert loss.x_ticks == ((40.0, "1"), (312.0, "2"))
    train, val = loss.lines
    assert train.points == ((40.0, 62.0), (312.0, 166.0))
    assert (train.best, val.best) == (None, (312.0, 114.0, "3.000"))
    assert len(bleu4.lines[0].points) == 1


def test_no_epochs_have_no_charts():
    assert layout_charts([]) == []


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.0, 3e-12), (0.5, 0.5 + 1e-9)])
def test_equal_and_nearly_equal_values_are_a_level_curve(values: tuple[float, float]) -> None:
    rows = [{"epoch": epoch, "val_bleu4": value} for epoch, value in enumerate(values, start=1)]
    (chart,) = layout_charts(rows)
    (line,) = chart.lines
    (first, second) = (y for _, y in line.points)
    assert TOP < first == second < BOTTOM
