"""Usage of words and phrases, on hand-made captions and against a definition by counting one word at a time."""

import random
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics.word_usage import Usage, WordUsage, human_word_usage, is_content_word, word_usage

WORDS = ("a", "the", "dog", "cat", "two", "bench", "<unk>", "!")


def usage_of(captions: Sequence[str], references: Sequence[Sequence[str]]) -> WordUsage:
    """Return the usage of captions of images 0, 1, 2, ..."""
    return word_usage(
        {index: caption.split() for index, caption in enumerate(captions)},
        {index: [reference.split() for reference in of_image] for index, of_image in enumerate(references)},
    )


def rows(usages: Sequence[Usage]) -> list[tuple[object, ...]]:
    return [(" ".join(usage.phrase), usage.said, usage.right, usage.in_references, usage.image_id) for usage in usages]


# Of eight images, all captions are of a bench, which one reference of image 2 has.
BENCHES = (
    ["a dog on a bench"] * 8,
    [["a dog on grass", "the dog runs"]] * 2 + [["a dog on a bench", "the dog runs"]] + [["a dog", "the dog runs"]] * 5,
)


def test_a_word_is_overused_if_it_is_said_far_more_often_and_mostly_wrongly() -> None:
    usage = usage_of(*BENCHES)
    assert rows(usage.overused_words) == [("bench", 8, 1, 0.5, 0)]
    assert usage.metrics["num_overused_words"] == 1


def test_a_word_that_is_mostly_right_is_not_overused() -> None:
    # The caption of each image is right by one of four references.
    references = [["a dog", "a puppy", "a puppy", "a puppy"]] * 8
    usage = usage_of(["a dog"] * 8, references)
    assert usage.overused_words == []
    assert rows(usage.underused_words) == [("puppy", 0, 0, 6.0, 0)]


@pytest.mark.parametrize(("num_wrong", "is_overused"), [(4, False), (5, True)])
def test_a_few_images_do_not_make_a_word_overused(num_wrong: int, is_overused: bool) -> None:
    captions = ["a bench"] * num_wrong + ["a dog"] * 20
    usage = usage_of(captions, [["a dog"]] * len(captions))
    assert [row[0] for row in rows(usage.overused_words)] == ["bench"] * is_overused


def test_a_word_is_underused_if_it_is_said_far_more_rarely() -> None:
    usage = usage_of(*BENCHES)
    assert rows(usage.underused_words) == []
    usage = usage_of(["a dog"] * 9, [["a red dog", "a dog"]] * 3 + [["a red dog", "a red dog"]] * 6)
    # The image has the word in both references.
    assert rows(usage.underused_words) == [("red", 0, 0, 7.5, 3)]


def test_an_example_of_an_overused_word_is_a_wrong_one() -> None:
    references = [["a bench"], *[["a dog"]] * 6]
    assert rows(usage_of(["a bench"] * 7, references).overused_words) == [("bench", 7, 1, 1.0, 1)]


def test_overlapping_phrases_are_listed_once() -> None:
    captions = ["a little girl runs", "a little girl jumps", "a little girl sits"] * 2
    usage = usage_of(captions, [["the child plays"]] * 6)
    assert [row[:2] for row in rows(usage.overused_phrases)] == [("<start> a little girl", 6)]


def test_openings_and_endings_are_phrases() -> None:
    captions = [f"{subject} sits on a bench" for subject in ("dog", "cat", "man", "boy", "girl")]
    usage = usage_of(captions, [["people walk"]] * 5)
    assert [row[0] for row in rows(usage.overused_phrases)] == ["on a bench <end>", "sits on a"]


def test_a_phrase_needs_a_content_word() -> None:
    captions = [f"{word} is on the {word}" for word in "vwxyz"]
    assert usage_of(captions, [["people walk"]] * 5).overused_phrases == []


def test_number_words_are_listed_with_their_counts() -> None:
    usage = usage_of(["two dogs", "two dogs", "a dog"], [["one dog"], ["two dogs"], ["three dogs"]])
    assert rows(usage.number_words) == [("one", 0, 0, 1.0, 0), ("three", 0, 0, 1.0, 2), ("two", 2, 1, 1.0, 0)]
    assert usage.metrics["number_precision"] == 0.5


def test_repeated_words_are_content_words_twice_in_a_caption() -> None:
    usage = usage_of(["a dog and a dog", "a man in a red shirt", "a red dog and a red cat"], [["a dog"]] * 3)
    assert [row[:2] for row in rows(usage.repeated_words)] == [("dog", 1), ("red", 1)]
    assert usage.metrics["repeated_word_rate"] == pytest.approx(2 / 3, abs=1e-6)


def test_precision_and_recall_of_content_words() -> None:
    usage = usage_of(["a dog on a bench", "a cat"], [["the dog runs", "a dog"], ["a dog", "a small cat"]])
    # dog, cat of dog, bench, cat; dog, dog, cat of dog, runs, dog, dog, small, cat
    assert usage.metrics["precision"] == pytest.approx(2 / 3, abs=1e-6)
    assert usage.metrics["recall"] == pytest.approx(3 / 6, abs=1e-6)


def test_captions_without_words_have_no_precision() -> None:
    metrics = usage_of(["", "a"], [["a dog"], ["a cat"]]).metrics
    assert (metrics["precision"], metrics["number_precision"], metrics["recall"]) == (None, None, 0)
    assert set(usage_of([], []).metrics.values()) == {None, 0}


@pytest.mark.parametrize("word", ["<unk>", "!", "The", "with"])
def test_function_words_and_special_tokens_are_not_content_words(word: str) -> None:
    assert not is_content_word(word)


def test_human_usage_takes_a_different_reference_of_each_image() -> None:
    # References are sorted: the first one always says "dog".
    references = {image_id: [["dog"], ["puppy"]] for image_id in range(12)} | {12: [["cat"]]}
    usage = human_word_usage(references)
    assert usage.overused_words == usage.underused_words == []
    assert usage.metrics["precision"] == 0  # the other reference never has the word


captions_st = st.lists(st.sampled_from(WORDS), max_size=5)
images_st = st.lists(st.tuples(captions_st, st.lists(captions_st, min_size=1, max_size=3)), max_size=12)


@settings(max_examples=50)
@given(images_st, st.randoms())
def test_counts_equal_those_by_definition_in_any_order(
    images: list[tuple[list[str], list[list[str]]]], shuffler: random.Random
) -> None:
    def shuffled(values: Mapping[int, list]) -> dict[int, list]:
        items = list(values.items())
        shuffler.shuffle(items)
        return dict(items)

    captions = {index: caption for index, (caption, _) in enumerate(images)}
    references = {index: of_image for index, (_, of_image) in enumerate(images)}
    usage = word_usage(captions, references)
    again = word_usage(shuffled(captions), shuffled(references))
    assert usage == again
    tables = usage.overused_words + usage.underused_words + usage.number_words
    for row in tables:
        (word,) = row.phrase
        with_word = [index for index, caption in captions.items() if word in caption]
        right = [index for index in with_word if any(word in reference for reference in references[index])]
        expected = sum(sum(word in reference for reference in of) / len(of) for of in references.values())
        assert (row.said, row.right) == (len(with_word), len(right))
        assert row.in_references == pytest.approx(expected, abs=1e-3)
        assert (row.image_id in with_word) == (row.said >= row.in_references)
    assert not {word for row in tables for word in row.phrase} & {"a", "the", "<unk>", "!"}
    assert {row.phrase for row in usage.overused_words}.isdisjoint({row.phrase for row in usage.underused_words})
