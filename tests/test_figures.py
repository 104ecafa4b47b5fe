import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline.report.figures import attention_strip, curves

ROWS = [
    {"epoch": 1, "train_loss": 4.0, "val_loss": 4.5, "val_bleu4": None, "learning_rate": 0.1},
    {"epoch": 2, "train_loss": 3.0, "val_loss": 3.5, "val_bleu4": 0.1, "learning_rate": 0.1},
    {"epoch": 3, "train_loss": 2.0, "val_loss": 3.75, "val_bleu4": 0.125, "test_cider": None},
]
PICTURE = np.full((40, 60, 3), (200, 100, 50), dtype=np.uint8)


def rgb(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def one_map(*peaks: tuple[int, int]) -> np.ndarray:
    attention = np.zeros((len(peaks), 4, 6), dtype=np.float32)
    for index, (row, column) in enumerate(peaks):
        attention[index, row, column] = 1.0
    return attention


def test_one_curve_a_measured_quantity(tmp_path):
    paths = curves(ROWS, tmp_path, ".png")
    assert paths == [tmp_path / "loss.png", tmp_path / "bleu4.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    loss, bleu4 = (rgb(path) for path in paths)
    gray = (0x8A, 0x8F, 0x98)
    assert (loss == gray).all(axis=-1).any()  # the line of train
    assert not (bleu4 == gray).all(axis=-1).any()


def test_no_rows_no_curves(tmp_path):
    assert curves([], tmp_path, ".svg") == []


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_same_data_same_bytes(tmp_path, suffix):
    first, second = (curves(ROWS, tmp_path / name, suffix) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    strips = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in strips:
        attention_strip(PICTURE, ["red", "cube"], one_map((0, 0), (3, 5)), path)
    assert strips[0].read_bytes() == strips[1].read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_suffix_in_capitals_is_the_same(tmp_path, suffix):
    for name in ("a" + suffix, "b" + suffix.upper()):
        attention_strip(PICTURE, ["red"], one_map((0, 0)), tmp_path / name)
    assert (tmp_path / ("b" + suffix.upper())).read_bytes() == (tmp_path / ("a" + suffix)).read_bytes()


def test_files_tell_no_date_and_no_version(tmp_path):
    png, svg = tmp_path / "strip.png", tmp_path / "strip.svg"
    for path in (png, svg):
        attention_strip(PICTURE, ["red"], one_map((0, 0)), path)
    with Image.open(png) as image:
        assert "Software" not in image.info
    text = svg.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "dc:date" not in text
    assert "Matplotlib" not in text


def test_panel_is_lit_where_attention_lies(tmp_path):
    path = tmp_path / "strip.png"
    attention_strip(PICTURE, ["here", "there"], one_map((0, 0), (3, 5)), path)
    pixels = rgb(path)
    panels = np.array_split(pixels, 3, axis=1)  # the picture, then a panel a word
    height, width = panels[0].shape[:2]
    corners = (
        (slice(height // 4, height // 3), slice(width // 10, width // 6)),
        (
            slice(-height // 6, -height // 10),
            slice(-width // 6, -width // 10),
        ),
    )
    here, there = ([panel[corner].mean() for corner in corners] for panel in panels[1:])
    plain = [panels[0][corner].mean() for corner in corners]
    assert here[0] > 1.5 * here[1]
    assert there[1] > 1.5 * there[0]
    assert plain[0] == pytest.approx(plain[1])


@pytest.mark.parametrize(("words", "across", "down"), [(0, 1, 1), (2, 3, 1), (5, 6, 1), (6, 6, 2), (12, 6, 3)])
def test_strip_grows_to_six_panels_a_row(tmp_path, words, across, down):
    one, many = tmp_path / "one.png", tmp_path / "many.png"
    attention_strip(PICTURE, [], one_map(), one)
    attention_strip(PICTURE, ["word"] * words, one_map(*[(0, 0)] * words), many)
    height, width = rgb(one).shape[:2]
    assert rgb(many).shape[0] / height == pytest.approx(down, rel=0.06)
    assert rgb(many).shape[1] / width == pytest.approx(across, rel=0.06)


def test_words_are_no_formulas(tmp_path):
    attention_strip(PICTURE, [r"$\frac$"], one_map((0, 0)), tmp_path / "strip.png")
    assert rgb(tmp_path / "strip.png").size


def test_every_word_needs_its_map(tmp_path):
    with pytest.raises(ValueError, match="2 words but 1 attention maps"):
        attention_strip(PICTURE, ["a", "cube"], one_map((0, 0)), tmp_path / "strip.png")


def test_pyplot_stays_unloaded():
    program = "import sys, pipeline.report.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
