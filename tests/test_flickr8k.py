from pathlib import Path

import pytest

from pipeline.captions.sources.flickr8k import parse
from pipeline.errors import UserError


def captions_by_file(path: Path) -> dict[str, list[str]]:
    return {image.file: [caption.text for caption in image.captions] for image in parse(path, ".").images}


def test_csv_captions_may_contain_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    rows = 'image,caption\na.jpg,A dog .\na.jpg,"A dog, a ""big"" one\nin two lines ."\nb.jpg,A cat .\n'
    path.write_bytes(b"\xef\xbb\xbf" + rows.encode())
    assert captions_by_file(path) == {
        "a.jpg": ["A dog .", 'A dog, a "big" one\nin two lines .'],
        "b.jpg": ["A cat ."],
    }


def test_locations_count_the_line_breaks_inside_captions(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text('image,caption\na.jpg,"A dog\nruns ."\nb.jpg,A cat .\n')
    first, second = parse(path, ".").images
    assert (first.location, second.location) == (f"{path}:2", f"{path}:4")


def test_official_token_file_groups_captions_by_name(tmp_path: Path) -> None:
    path = tmp_path / "Flickr8k.token.txt"
    lines = [f"11_00000000ab.jpg#{index}\tCaption {index} , of it .\r\n" for index in range(5)]
    # The official file has captions of one image that does not exist, with a name like this.
    lines.append("11_00000000ab.jpg.1#0\tNo image .\r\n")
    path.write_text("".join(lines), newline="")
    captions = captions_by_file(path)
    assert list(captions) == ["11_00000000ab.jpg", "11_00000000ab.jpg.1"]
    assert captions["11_00000000ab.jpg"][4] == "Caption 4 , of it ."
    assert parse(path, ".").images[0].image_id == 11


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("a.jpg,A dog .\n", 1, "'image,caption'"),
        ("", 1, "'image,caption'"),
        ('image,caption\na.jpg,A\nb.jpg,"A dog\n', 3, "not valid CSV"),
        ("image,caption\na.jpg,A\nb.jpg,A cat, sleeping\n", 3, "expected 2 columns, got 3"),
        ("a.jpg#0\tA\nb.jpg A cat\n", 2, "'b.jpg A cat'"),
    ],
)
def test_malformed_line_is_an_error_with_its_number(tmp_path: Path, content: str, line: int, message: str) -> None:
    path = tmp_path / "captions.txt"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        parse(path, ".")
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert message in str(error.value)


def test_all_rows_with_a_wrong_number_of_columns_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("image,caption\na.jpg,A dog, big\nb.jpg,A cat, too\nc.jpg,A cow\n")
    with pytest.raises(UserError) as error:
        parse(path, ".")
    assert f"{path}:2: " in str(error.value)
    assert f"{path}:3: " in str(error.value)
    assert f"{path}:4: " not in str(error.value)


FLICKR30K = (
    "image_name| comment_number| comment\r\n"
    "1.jpg| 0| Two men, one in a red hat, talk .\r\n"
    "1.jpg| 1| A sign says a|b .\n"
    "2.jpg| 4   A dog runs .\n"
    "2.jpg| 1| A cat .\n"
    "3.jpg\n"
)


def test_flickr30k_table_keeps_commas_and_reports_the_row_without_its_second_bar(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(FLICKR30K, newline="")
    captions = {name: [text.strip() for text in texts] for name, texts in captions_by_file(path).items()}
    assert captions == {
        "1.jpg": ["Two men, one in a red hat, talk .", "A sign says a|b ."],
        "2.jpg": ["A cat ."],
        "3.jpg": [""],
    }
    assert parse(path, ".").malformed_rows == [f"{path}:4 (2.jpg)"]


def test_csv_may_have_other_columns_and_rows_that_lack_some(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text('Caption,id,Image\n"A dog, running",7,a.jpg\nA cat,8\n,,\n')
    assert captions_by_file(path) == {"a.jpg": ["A dog, running"]}
    assert parse(path, ".").unmatched_captions == [f"{path}:3 (no image name)"]
    path.write_text("image,id,caption\na.jpg,7,A dog\nb.jpg,8\n")
    assert parse(path, ".").malformed_rows == [f"{path}:3 (b.jpg)"]


@pytest.mark.parametrize("content", ["image,caption\na.jpg\n", "a.jpg#0\tA\na.jpg#1\n"])
def test_row_with_only_a_name_is_an_empty_caption(tmp_path: Path, content: str) -> None:
    path = tmp_path / "captions.txt"
    path.write_text(content)
    (image,) = parse(path, ".").images
    assert image.captions[-1] == ("", f"{path}:2")


def test_caption_without_an_image_name_is_unmatched(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("image,caption\n,A dog\na.jpg,A cat\n")
    assert parse(path, ".").unmatched_captions == [f"{path}:2 (no image name)"]
