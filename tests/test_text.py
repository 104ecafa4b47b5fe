"""Captions without images: the removal of those of val and test images, and their words in the vocabulary."""

from pathlib import Path

import pytest

from pipeline.captions.records import Record, Split
from pipeline.captions.text import HeldOutImages, TextCaption
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.captions.tokens import read_tokens, tokenize, write_tokens
from pipeline.errors import UserError

PARAMS = TokenizeParams(language="en", lowercase=True, punctuation="drop", min_count=1, max_length=4)


def record(image_id: int, split: Split, file: str, *captions: str) -> Record:
    return Record(image_id=image_id, file=file, split=split, captions=captions)


RECORDS = [
    record(1, "train", "a/1.jpg", "A dog runs"),
    record(2, "val", "a/2.jpg", "A Zebra stands."),
    record(3, "test", "b/3.jpg", "The café, at night", "..."),
]


@pytest.mark.parametrize(
    "caption",
    [
        TextCaption("a zebra stands"),  # a caption of val
        TextCaption("THE cafe\u0301 at-night!!"),
        TextCaption("something else", "2.jpg"),  # an image of val
        TextCaption("something else", "other\\folder\\3.PNG"),
        TextCaption("something else", "COCO_val2014_3.jpg"),
        TextCaption("something else", "renamed.jpg"),  # an image that has a caption of val
    ],
)
def test_captions_of_val_and_test_images_are_left_out(caption: TextCaption) -> None:
    held_out = HeldOutImages()
    for image in RECORDS[1:]:
        held_out.add(image)
    kept = [TextCaption("A dog runs"), TextCaption("a zebra stands up", "1.jpg"), TextCaption("?!", "4.jpg")]
    renamed = TextCaption("A zebra stands", "renamed.jpg")
    assert held_out.exclude_from([*kept, caption, renamed]) == kept


def test_words_of_the_text_are_in_the_vocabulary(tmp_path: Path) -> None:
    text = [
        TextCaption("A horse jumps over a fence"),
        TextCaption("a Zebra stands"),
        TextCaption("..."),
        TextCaption("Dogs"),
    ]
    dataset = tokenize(RECORDS, PARAMS, tmp_path, text)
    without = tokenize(RECORDS, PARAMS, tmp_path)
    assert "zebra" not in dataset.vocabulary.words
    assert set(dataset.vocabulary.words) - set(without.vocabulary.words) == {
        *["horse", "jumps", "over", "fence", "dogs"]
    }
    assert dataset.vocabulary.words[4] == "a"  # three times in train and text
    assert dataset.text.captions == ["a horse jumps over a fence", "dogs"]
    assert dataset.text.image_id.tolist() == [0, 1]
    assert dataset.text.length.tolist() == [5, 3]
    text_metrics = {name: value for name, value in dataset.metrics.items() if name.startswith("text")}
    assert text_metrics == {
        "text_num_captions": 2,
        "text_num_truncated": 1,
        "text_words_per_caption": 3.5,
        "text_unk_rate": 0.0,
        "text_num_held_out": 1,
        "text_num_without_words": 1,
    }
    assert not any(name.startswith("text") for name in without.metrics)
    write_tokens(tmp_path / "tokens.h5", dataset, PARAMS, "0")
    read = read_tokens(tmp_path / "tokens.h5", "text")
    assert read.captions == dataset.text.captions
    assert read.ids.tolist() == dataset.text.ids.tolist()
    write_tokens(tmp_path / "without.h5", without, PARAMS, "0")
    assert read_tokens(tmp_path / "without.h5", "text").captions == []


def test_a_text_of_val_and_test_alone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.text: all of its 1 captions are of images of val or test"):
        tokenize(RECORDS, PARAMS, tmp_path, [TextCaption("a zebra stands")])
