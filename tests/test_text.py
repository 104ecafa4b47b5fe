"""Captions without images: the formats of their files, and the removal of images of val and test."""

import gzip
import json
from pathlib import Path

import pytest

from pipeline.captions.records import Record, Split
from pipeline.captions.sources.text_file import read_text_captions
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


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'image,caption\n1.jpg,"A dog, running"\n2.jpg,A cat\n'),
        ("a.txt", "\ufeffimage,caption\n1.jpg,'A dog'\n"),
        ("a.txt", "1.jpg#0\tA dog\n1.jpg#1\tA cat\n"),
        ("a.csv", "image_name| comment_number| comment\n1.jpg| 0| A dog\n"),
        (
            "a.json",
            json.dumps(
                {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "A dog"}]}
            ),
        ),
    ],
)
def test_caption_files_of_datasets_name_images(tmp_path: Path, name: str, content: str) -> None:
    captions = read_text_captions(write(tmp_path / name, content))
    assert captions[0].image == "1.jpg"
    assert captions[0].text.strip("'").startswith("A dog")
    assert all(caption.image is not None for caption in captions)


def test_other_files_have_one_caption_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "A dog, running\r\n\n  \nA cat | a mouse, it.\n")
    assert read_text_captions(path) == [TextCaption("A dog, running"), TextCaption("A cat | a mouse, it.")]
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"A dog"))
    assert read_text_captions(tmp_path / "b.gz") == [TextCaption("A dog")]


def test_a_folder_has_the_captions_of_its_files(tmp_path: Path) -> None:
    assert read_text_captions(tmp_path) == []
    write(tmp_path / "README.md", "# Captions")
    write(tmp_path / ".gitignore", "*")
    assert read_text_captions(tmp_path) == []
    write(tmp_path / "b.txt", "A dog")
    write(tmp_path / "a.csv", "image,caption\n,A cat\n")
    assert read_text_captions(tmp_path) == [TextCaption("A cat"), TextCaption("A dog")]
    (tmp_path / "more").mkdir()
    with pytest.raises(UserError, match=r"more: is a folder\. Put its files into"):
        read_text_captions(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt: has no captions"),
        ("a.txt", "\n \n", r"a\.txt: has no captions"),
        ("a.txt", "A dog\n7.jpg,A cat", r"a\.txt:2: begins with the name of an image.*header"),
        ("a.csv", 'file,text\n"x/7.PNG","A cat"', r"a\.csv:2: begins with the name of an image.*header"),
        ("a.csv", "image,caption\n7.jpg,a,b", r"a\.csv:2: expected 2 columns, got 3"),
        ("a.csv", "image_name|comment_number|comment\n7.jpg|0\n7.jpg|0|A dog", r"without a readable.*a\.csv:2"),
        ("a.json", "[]", r"a\.json: "),
    ],
)
def test_malformed_files_are_errors(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_text_captions(write(tmp_path / name, content))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.csv: no such file"):
        read_text_captions(tmp_path / "absent.csv")


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
    text = [TextCaption("A horse jumps over a fence"), TextCaption("a Zebra stands"), TextCaption("..."), TextCaption("Dogs")]
    dataset = tokenize(RECORDS, PARAMS, tmp_path, text)
    without = tokenize(RECORDS, PARAMS, tmp_path)
    assert "zebra" not in dataset.vocabulary.words
    assert set(dataset.vocabulary.words) - set(without.vocabulary.words) == {*"horse jumps over fence dogs".split()}
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
