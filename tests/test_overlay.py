import base64

import numpy as np

from pipeline.report.overlay import DIMMED_BRIGHTNESS, GLOW, attention_levels, encode_levels, jpeg_url, overlay_js


def test_the_most_attended_region_of_each_word_is_at_level_255() -> None:
    attention = np.array([[[0.5, 0.25, 0.25]], [[0.1, 0.1, 0.8]]], dtype=np.float32)
    levels = attention_levels(attention)
    assert levels.dtype == np.uint8
    assert levels.tolist() == [[[255, 128, 128]], [[32, 32, 255]]]


def test_levels_of_no_words_and_of_no_attention() -> None:
    assert attention_levels(np.zeros((0, 4, 6))).shape == (0, 4, 6)
    assert attention_levels(np.zeros((1, 2, 2))).tolist() == [[[0, 0], [0, 0]]]


def test_float16_attention_gives_the_levels_of_float32() -> None:
    attention = np.array([[[0.0625, 0.9375]]])
    assert (attention_levels(attention.astype(np.float16)) == attention_levels(attention)).all()


def test_levels_are_encoded_in_row_major_order() -> None:
    levels = np.array([[1, 2, 3], [4, 5, 255]], dtype=np.uint8)
    assert list(base64.b64decode(encode_levels(levels))) == [1, 2, 3, 4, 5, 255]


def test_jpeg_url_holds_the_bytes() -> None:
    content = bytes(range(256))
    prefix, encoded = jpeg_url(content).split(",")
    assert prefix == "data:image/jpeg;base64"
    assert base64.b64decode(encoded) == content


def test_script_starts_with_the_constants() -> None:
    lines = overlay_js().splitlines()
    assert f"DIMMED_BRIGHTNESS = {DIMMED_BRIGHTNESS};" in lines[0]
    assert f"GLOW = {[round(255 * channel) for channel in GLOW]};" in lines[1]
