import pytest

from pipeline.metrics.diversity import diversity


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        pytest.param(
            ["a dog runs", "a dog runs", "a red cube"],
            {
                "num_captions": 3,
                "words_per_caption": 3,
                "min_length": 3,
                "max_length": 3,
                "num_distinct_captions": 2,
                "distinct_rate": 2 / 3,
                "vocab_size": 5,
                "vocab_coverage": 3 / 4,
                "distinct_bigram_rate": 4 / 6,
                "bad_endings": 0,
                "verbatim_in_train": 2 / 3,
            },
            id="repeated caption",
        ),
        pytest.param(
            ["", "x"],
            {
                "num_captions": 2,
                "words_per_caption": 0.5,
                "min_length": 0,
                "max_length": 1,
                "num_distinct_captions": 2,
                "distinct_rate": 1,
                "vocab_size": 1,
                "vocab_coverage": 0,
                "distinct_bigram_rate": None,
                "bad_endings": 0.5,
                "verbatim_in_train": 0,
            },
            id="empty caption",
        ),
        pytest.param(
            ["a dog in The"],
            {
                "num_captions": 1,
                "words_per_caption": 4,
                "min_length": 4,
                "max_length": 4,
                "num_distinct_captions": 1,
                "distinct_rate": 1,
                "vocab_size": 4,
                "vocab_coverage": 0.5,
                "distinct_bigram_rate": 1,
                "bad_endings": 1,
                "verbatim_in_train": 0,
            },
            id="bad ending",
        ),
    ],
)
def test_diversity(captions: list[str], expected: dict[str, float]) -> None:
    train_captions = {"a dog runs", "a dog runs home"}
    vocabulary = {"a", "dog", "red", "home"}
    assert diversity([caption.split() for caption in captions], vocabulary, train_captions) == pytest.approx(
        expected, abs=1e-3
    )
