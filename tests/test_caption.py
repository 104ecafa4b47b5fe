"""The type of a generated caption."""

import math

import numpy as np
import pytest

from pipeline.generation.caption import Caption


def make_caption(**changes: object) -> Caption:
    fields: dict[str, object] = {
        "words": ("a", "dog"),
        "log_probability": -2.0,
        "score": -1.0,
        "word_log_probabilities": (math.log(0.8), math.log(0.2)),
        "attention": np.full((2, 6), 1 / 6, dtype=np.float32),
    }
    return Caption(**(fields | changes))  # type: ignore[arg-type]


def test_confidence_is_the_geometric_mean_of_the_word_probabilities() -> None:
    caption = make_caption()
    assert caption.text == "a dog"
    assert caption.word_probabilities == pytest.approx([0.8, 0.2])
    assert caption.confidence == pytest.approx(0.4)


def test_a_caption_without_words_has_confidence_0() -> None:
    caption = make_caption(words=(), word_log_probabilities=(), attention=np.zeros((0, 6)))
    assert (caption.text, caption.confidence) == ("", 0.0)
    assert caption.complete((2, 3), "en").attention.shape == (0, 2, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("language", "words", "text"),
    [
        ("en", ("a", "dog"), "a dog"),
        ("zh", ("一", "只", "狗"), "一只狗"),
        ("ja", ("犬", "が", "走る"), "犬が走る"),
        ("th", ("สุนัข", "วิ่ง"), "สุนัขวิ่ง"),
        ("vi", ("sinh_viên", "chạy"), "sinh viên chạy"),
        ("ko", ("개", "가"), "개 가"),
    ],
)
def test_words_are_joined_as_their_language_is_written(language: str, words: tuple[str, ...], text: str) -> None:
    caption = make_caption(words=words, attention=np.zeros((len(words), 6))).complete((2, 3), language)
    assert caption.text == text


def test_captions_are_equal_whatever_their_attention() -> None:
    assert make_caption() == make_caption(attention=None)
    assert make_caption() != make_caption(score=-0.5)


def test_attention_is_reshaped_by_rows() -> None:
    attention = np.arange(12, dtype=np.float32).reshape(2, 6)
    reshaped = make_caption(attention=attention).complete((2, 3), "en").attention
    assert reshaped is not None
    assert reshaped[1].tolist() == [[6, 7, 8], [9, 10, 11]]
