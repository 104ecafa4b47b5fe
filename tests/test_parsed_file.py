import hashlib
from pathlib import Path

import pytest

from pipeline.captions.sources.parsed_file import id_from_name, join_relative, read_text
from pipeline.errors import UserError


def test_flickr_name_gives_its_leading_digits_as_id() -> None:
    assert id_from_name("Images/1000268201_693b08cb0e.jpg") == 1000268201


def test_any_other_name_gives_a_hash_of_its_path_as_id() -> None:
    assert id_from_name("holiday/1.png") == int(hashlib.sha256(b"holiday/1.png").hexdigest()[:12], 16)
    assert id_from_name("2258277193_586949ec62.jpg.1") != id_from_name("2258277193_586949ec62.jpg")
    assert id_from_name("20240311_142233.jpg") != id_from_name("20240311_142301.jpg")


def test_join_relative_drops_dots() -> None:
    assert join_relative(".", ".", "a.jpg") == "a.jpg"
    assert join_relative("train", "2014", "a.jpg") == "train/2014/a.jpg"


def test_read_text_skips_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(b"\xef\xbb\xbfimage,caption\n")
    assert read_text(path) == "image,caption\n"


def test_byte_that_is_not_utf8_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(b"image,caption\na.jpg,caf\xe9\n")
    with pytest.raises(UserError) as error:
        read_text(path)
    assert f"{path}:2: " in str(error.value)
    assert "0xe9" in str(error.value)
