"""Leaks between splits, and captions that many images share."""

import io
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.captions.leaks import count_caption_images, find_leaked_images, min_shared_images
from pipeline.captions.records import Record, Split
from pipeline.captions.sources.image_digests import image_md5s
from tests.dataset_files import LISTS, prepare_by_file


def make_records(**splits: Split) -> list[Record]:
    return [
        Record(image_id=index, file=f"{name}.jpg", split=split, captions=("a dog",))
        for index, (name, split) in enumerate(splits.items())
    ]


def leaked(folder: Path, records: list[Record]) -> list[list[str]]:
    """The leaks found by size and content, and if all files can be read, the same by MD5."""
    leaks = find_leaked_images(folder, records)
    files = [record.file for record in records]
    if all((folder / file).is_file() for file in files):
        assert find_leaked_images(folder, records, image_md5s(folder, files)) == leaks
    return [[record.file for record in group] for group in leaks]


def jpeg(seed: int, quality: int = 90) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def test_only_files_with_the_same_bytes_in_several_splits_are_leaks(tmp_path: Path) -> None:
    contents = {"a": jpeg(1), "b": jpeg(1), "c": jpeg(1), "again": jpeg(1, quality=60), "d": jpeg(2), "e": jpeg(2)}
    contents["other"] = bytearray(contents["a"])
    contents["other"][-3] ^= 1  # same size and middle
    for name, content in contents.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    records = make_records(a="train", b="test", c="val", again="test", d="train", e="train", other="test")

    assert leaked(tmp_path, records) == [["a.jpg", "b.jpg", "c.jpg"]]


def test_empty_missing_and_unreadable_files_are_not_leaks(tmp_path: Path) -> None:
    for name in ("empty", "empty2"):
        (tmp_path / f"{name}.jpg").touch()
    os.mkdir(tmp_path / "folder.jpg")
    os.mkdir(tmp_path / "folder2.jpg")
    records = make_records(empty="train", empty2="test", missing="train", folder="train", folder2="test")

    assert leaked(tmp_path, records) == []
    assert leaked(tmp_path, records[:2]) == []


def test_few_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {"a": b"1" * 9000, "b": b"2" * 9000, "c": b"3" * 9001, "d": b"1" * 9000}.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    opened: list[str] = []
    monkeypatch.setattr("pipeline.captions.leaks.file_digest", lambda path: opened.append(path.name) or b"")

    find_leaked_images(tmp_path, make_records(a="train", b="val", c="test", d="train"))

    assert opened == []  # neither the sizes nor the middles of two splits are equal


def test_captions_are_counted_once_per_image() -> None:
    texts = [("A dog.", "a dog"), ("a dog .",), ("A cat",)]
    records = [
        Record(image_id=index, file="a.jpg", split="train", captions=captions) for index, captions in enumerate(texts)
    ]
    assert count_caption_images(records) == {"a dog": 2, "a cat": 1}


@pytest.mark.parametrize(("num_images", "expected"), [(1, 5), (500, 5), (501, 6), (123_287, 1233)])
def test_many_images_are_at_least_five_and_a_hundredth(num_images: int, expected: int) -> None:
    assert min_shared_images(num_images) == expected


def write_dataset(folder: Path, captions: dict[str, str], splits: dict[str, list[str]]) -> None:
    (folder / "captions.txt").write_text("image,caption\n" + "".join(f"{n},{c}\n" for n, c in captions.items()))
    for split, names in splits.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def test_prepare_counts_leaks_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{index}.jpg" for index in range(12)]
    for index, name in enumerate(names):
        (tmp_path / name).write_bytes(jpeg(index))
    (tmp_path / "11.jpg").write_bytes(jpeg(0))
    captions = {name: "The image is too dark" if index < 6 else f"Caption {index}" for index, name in enumerate(names)}
    write_dataset(tmp_path, captions, {"train": names[:8], "val": names[8:10], "test": names[10:]})

    with caplog.at_level(logging.WARNING, "gridcap"):
        _, counts = prepare_by_file(tmp_path, splits=LISTS)

    assert counts.num_leaked_images == {"train": 1, "val": 0, "test": 1}
    assert (counts.num_shared_captions, counts.max_images_per_caption) == (1, 6)
    leaks, shared = caplog.messages
    assert "in more than one split (1): 0.jpg (train) = 11.jpg (test)" in leaks
    assert "(1): 'the image is too dark' (6 images)" in shared


def test_prepare_does_not_warn_of_a_dataset_without_leaks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{index}.jpg" for index in range(4)]
    for index, name in enumerate(names):
        (tmp_path / name).write_bytes(jpeg(index // 2))  # equal files in one split
    write_dataset(tmp_path, dict.fromkeys(names, "A dog"), {"train": names[:2], "val": names[2:3], "test": names[3:]})
    (tmp_path / "3.jpg").write_bytes(jpeg(3))

    _, counts = prepare_by_file(tmp_path, splits=LISTS)

    assert counts.num_leaked_images == {"train": 0, "val": 0, "test": 0}
    assert (counts.num_shared_captions, counts.max_images_per_caption) == (0, 4)
    assert caplog.messages == []
