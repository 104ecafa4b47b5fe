import base64

import numpy as np
import pytest

from pipeline.report.overlay import (
    DIMMED_BRIGHTNESS,
    GLOW,
    attention_levels,
    encode_levels,
    jpeg_url,
    overlay_js,
    sentinel_label,
    sentinel_weights,
)


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


def test_the_sentinel_has_what_the_regions_lack_of_1() -> None:
    attention = np.array([[[0.25, 0.125]], [[0.5, 0.5]], [[0.0, 0.0]], [[0.75, 0.25001]]])
    assert sentinel_weights(attention).tolist() == pytest.approx([0.625, 0, 1, 0])
    assert sentinel_weights(np.zeros((0, 4, 6))).shape == (0,)


@pytest.mark.parametrize("num_regions", [49, 196])
def test_decoders_without_a_sentinel_have_no_label_even_in_float16(num_regions: int) -> None:
    logits = np.random.default_rng(0).normal(size=(200, num_regions, 1))
    attention = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert set(map(sentinel_label, sentinel_weights(attention.astype(np.float16)).tolist())) == {""}
    assert (sentinel_label(0.624), sentinel_label(1.0), sentinel_label(0.004)) == ("sentinel 62%", "sentinel 100%", "")


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
