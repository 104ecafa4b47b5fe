import numpy as np
import pytest
from PIL import Image, ImageColor

from pipeline.report.curve_style import SPLIT_COLORS
from pipeline.report.figures import attention_strip, draw_curves
from tests.evaluation_data import peaked_attention
from tests.imports import imported_packages

ROWS = [
    {"epoch": 1, "train_loss": 4.0, "val_loss": 4.5, "val_bleu4": None, "learning_rate": 0.1},
    {"epoch": 2, "train_loss": 3.0, "val_loss": 3.5, "val_bleu4": 0.1, "learning_rate": 0.1},
    {"epoch": 3, "train_loss": 2.0, "val_loss": 3.75, "val_bleu4": 0.125, "test_cider": None},
]
IMAGE = np.full((40, 60, 3), (200, 100, 50), dtype=np.uint8)


def rgb(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_one_figure_per_metric_with_values(tmp_path):
    paths = draw_curves(ROWS, tmp_path, ".png")
    assert paths == [tmp_path / "loss.png", tmp_path / "bleu4.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    loss, bleu4 = (rgb(path) for path in paths)
    train_color = ImageColor.getrgb(SPLIT_COLORS["train"])
    assert (loss == train_color).all(axis=-1).any()
    assert not (bleu4 == train_color).all(axis=-1).any()


@pytest.mark.slow
def test_words_are_drawn_in_an_installed_font_of_their_script_or_a_warning_names_a_character(tmp_path, caplog):
    def draw(name, *words):
        attention_strip(IMAGE, words, peaked_attention(*[(0, 0)] * len(words)), tmp_path / name)
        return (tmp_path / name).read_bytes()

    assert draw("a.png", "dog", "runs") != draw("b.png", "dog", "ran")
    assert not caplog.records
    draw("c.png", "\u0359")  # a font of Matplotlib has it, unlike the default font
    assert not caplog.records
    draw("d.png", "dog", "\U000f0000")
    draw("e.png", "\U000f0000")
    [record] = caplog.records
    assert "\U000f0000" in record.getMessage()


def test_no_rows_give_no_figures(tmp_path):
    assert draw_curves([], tmp_path, ".svg") == []


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_data_give_the_same_bytes(tmp_path, suffix):
    first, second = (draw_curves(ROWS, tmp_path / name, suffix) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    strips = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in strips:
        attention_strip(IMAGE, ["red", "cube"], peaked_attention((0, 0), (3, 5)), path)
    assert strips[0].read_bytes() == strips[1].read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_an_uppercase_suffix_gives_the_same_bytes(tmp_path, suffix):
    for name in ("a" + suffix, "b" + suffix.upper()):
        attention_strip(IMAGE, ["red"], peaked_attention((0, 0)), tmp_path / name)
    assert (tmp_path / ("b" + suffix.upper())).read_bytes() == (tmp_path / ("a" + suffix)).read_bytes()


def test_files_have_no_date_and_no_version(tmp_path):
    png, svg = tmp_path / "strip.png", tmp_path / "strip.svg"
    for path in (png, svg):
        attention_strip(IMAGE, ["red"], peaked_attention((0, 0)), path)
    with Image.open(png) as image:
        assert "Software" not in image.info
    text = svg.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "dc:date" not in text
    assert "Matplotlib" not in text


def test_a_panel_is_bright_where_attention_is_high(tmp_path):
    path = tmp_path / "strip.png"
    attention_strip(IMAGE, ["here", "there"], peaked_attention((0, 0), (3, 5)), path)
    pixels = rgb(path)
    panels = np.array_split(pixels, 3, axis=1)  # the image, then one panel per word
    height, width = panels[0].shape[:2]
    corners = (
        (slice(height // 4, height // 3), slice(width // 10, width // 6)),
        (slice(-height // 6, -height // 10), slice(-width // 6, -width // 10)),
    )
    here, there = ([panel[corner].mean() for corner in corners] for panel in panels[1:])
    original = [panels[0][corner].mean() for corner in corners]
    assert here[0] > 1.5 * here[1]
    assert there[1] > 1.5 * there[0]
    assert original[0] == pytest.approx(original[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_words", "num_columns", "num_rows"), [(0, 1, 1), (2, 3, 1), (5, 6, 1), (6, 6, 2), (12, 6, 3)]
)
def test_a_strip_has_up_to_six_panels_per_row(tmp_path, num_words, num_columns, num_rows):
    single, strip = tmp_path / "single.png", tmp_path / "strip.png"
    attention_strip(IMAGE, [], peaked_attention(), single)
    attention_strip(IMAGE, ["word"] * num_words, peaked_attention(*[(0, 0)] * num_words), strip)
    height, width = rgb(single).shape[:2]
    assert rgb(strip).shape[0] / height == pytest.approx(num_rows, rel=0.06)
    assert rgb(strip).shape[1] / width == pytest.approx(num_columns, rel=0.06)


def test_the_weight_of_the_sentinel_follows_the_word(tmp_path):
    path = tmp_path / "strip.svg"
    attention_strip(IMAGE, ["of", "red"], peaked_attention((0, 0), (0, 0)) * [[[0.38]], [[1.0]]], path)
    text = path.read_text(encoding="utf-8")
    assert "<!-- of · sentinel 62% -->" in text
    assert "<!-- red -->" in text


def test_words_are_not_parsed_as_math(tmp_path):
    attention_strip(IMAGE, [r"$\frac$"], peaked_attention((0, 0)), tmp_path / "strip.png")
    assert rgb(tmp_path / "strip.png").size


def test_words_and_maps_must_match_in_number(tmp_path):
    with pytest.raises(ValueError, match="2 words but 1 attention maps"):
        attention_strip(IMAGE, ["a", "cube"], peaked_attention((0, 0)), tmp_path / "strip.png")


@pytest.mark.slow
def test_pyplot_is_not_imported():
    assert imported_packages("import pipeline.report.figures", ["matplotlib.pyplot"]) == []
