"""The formats of files of captions without images."""

import gzip
import json
from pathlib import Path

import pytest

from pipeline.captions.sources.text_file import read_text_captions
from pipeline.captions.text import TextCaption
from pipeline.errors import UserError


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
        ("a.csv", 'Caption,Image\n"A dog, running",1.jpg\nA cat,2.jpg\n'),
        ("a.txt", "id,image,caption\n7,1.jpg,A dog\n"),
        ("a.csv", '"image", "caption"\n1.jpg,A dog\n , \n\n'),
        ("a.txt", "1.jpg#0\tA dog, caption, and a sign\n"),
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
    path = write(tmp_path / "a.txt", "Photo, caption, frame\r\n\n  \nA cat | a mouse, it.\n")
    assert read_text_captions(path) == [TextCaption("Photo, caption, frame"), TextCaption("A cat | a mouse, it.")]
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"A dog"))
    assert read_text_captions(tmp_path / "b.gz") == [TextCaption("A dog")]


def test_csv_needs_no_images(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'caption\n"A dog, running"\nA cat\n')
    assert read_text_captions(path) == [TextCaption("A dog, running"), TextCaption("A cat")]


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
        ("a.csv", "", r"a\.csv: has no captions"),
        ("a.txt", "A dog\n7.jpg,A cat", r"a\.txt:2: has the name of an image.*header"),
        ("a.txt", "text,file\nA cat,x/7.PNG", r"a\.txt:2: has the name of an image.*header"),
        ("a.csv", "A dog\nA cat", r"a\.csv:1: expected a header with the columns 'image' and 'caption'.*\.txt"),
        ("a.csv", "file_name,caption\n7.jpg,A cat", r"a\.csv:1: expected a header"),
        ("a.txt", "file_name,caption\n7.jpg,A cat", r"a\.txt:2: has the name of an image.*header"),
        ("a.csv", "image,image,caption\n7.jpg,8.jpg,A cat", r"a\.csv:1: expected a header"),
        ("a.tsv", "image;caption\n7;A cat", r"a\.tsv:1: expected a header"),
        ("a.csv", "image,caption\n7.jpg,a,b", r"a\.csv:2: expected 2 columns, got 3"),
        ("a.csv", "id,image,caption\n1\n2,7.jpg", r"rows without a caption \(2\): .*a\.csv:2; .*a\.csv:3"),
        ("a.csv", "image,caption\n7.jpg,A dog\n8.jpg\n9.jpg,", r"rows without a caption \(2\): .*a\.csv:3; .*a\.csv:4"),
        ("a.txt", "A dog\nA \x1b[31mcat", r"control characters \(1\): .*a\.txt:2 \('\\x1b'\)"),
        ("a.txt", "A dog\x0cA cat", r"control characters \(1\): .*a\.txt:1"),
        (
            "a.csv",
            "image_name|comment_number|comment\n7.jpg|0\n7.jpg|0|A dog",
            r"rows without a caption.*a\.csv:2",
        ),
        ("a.json", "[]", r"a\.json: "),
    ],
)
def test_malformed_files_are_errors(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_text_captions(write(tmp_path / name, content))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.csv: no such file"):
        read_text_captions(tmp_path / "absent.csv")
