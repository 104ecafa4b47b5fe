import csv
import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.captions.records import Record
from pipeline.captions.sources.parsed_file import id_from_path
from pipeline.errors import UserError
from tests.dataset_files import (
    FOUR_CAPTIONS,
    LISTS,
    SEEDED,
    prepare_by_file,
    touch,
    touch_four_images,
    write_coco,
    write_numbered_captions,
    write_three_coco_files,
)
from tests.paths import REAL

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real data in ../shared/real")

IMAGE = {"id": 1, "file_name": "1.jpg"}
CAPTION = {"id": 0, "image_id": 1, "caption": "A dog."}


def test_several_coco_files_become_one_dataset(tmp_path: Path) -> None:
    changes = write_three_coco_files(tmp_path)
    write_coco(tmp_path / "test.json", [{"id": 3, "file_name": "3.jpg"}], [(3, " A cube. \n"), (3, "Ein Würfel.")])
    records, counts = prepare_by_file(tmp_path, **changes)
    assert records["test/3.jpg"] == Record(
        image_id=3, file="test/3.jpg", split="test", captions=("A cube.", "Ein Würfel.")
    )
    assert records["train/1.jpg"].split == "train"
    assert counts.num_images == {"train": 1, "val": 1, "test": 1}
    assert counts.num_captions == {"train": 1, "val": 1, "test": 2}


def test_one_file_may_be_split_while_another_has_its_split(tmp_path: Path) -> None:
    changes = write_three_coco_files(tmp_path)
    touch(tmp_path, "val/4.jpg")
    images = [{"id": image_id, "file_name": f"{image_id}.jpg"} for image_id in (2, 4)]
    write_coco(tmp_path / "val.json", images, [(2, "A dog."), (4, "A cat.")])
    changes["captions"] = [
        {"file": "train.json", "folder": "train", "split": "train"},
        {"file": "val.json", "folder": "val", "split": None},
    ]
    changes["splits"] = {"by": "seed", "seed": 1, "val": 0.5, "test": 0.5}
    assert prepare_by_file(tmp_path, **changes)[1].num_images == {"train": 1, "val": 1, "test": 1}


def test_images_in_no_split_are_left_out_and_counted(tmp_path: Path) -> None:
    touch_four_images(tmp_path)
    (tmp_path / "captions.txt").write_text(FOUR_CAPTIONS)
    for split, name in (("train", "a.jpg"), ("val", "b.jpg"), ("test", "c.jpg")):
        (tmp_path / f"{split}.txt").write_text(f"{name}\n")
    records, counts = prepare_by_file(tmp_path, splits=LISTS)
    assert {file: record.split for file, record in records.items()} == {
        "a.jpg": "train",
        "b.jpg": "val",
        "c.jpg": "test",
    }
    assert counts.num_unassigned_images == 1


def test_skipped_images_and_captions_are_counted_by_reason(tmp_path: Path) -> None:
    changes = write_three_coco_files(tmp_path) | {"missing_images": "skip", "bad_captions": "skip"}
    images = [{"id": image_id, "file_name": f"{image_id}.jpg"} for image_id in (1, 4, 5)]
    captions = [(1, "A dog."), (1, "  "), (4, "Not there."), (4, "Nor this."), (5, ""), (6, "Whose?")]
    write_coco(tmp_path / "train.json", images, captions)
    touch(tmp_path, "train/5.jpg")
    records, counts = prepare_by_file(tmp_path, **changes)
    assert records["train/1.jpg"].captions == ("A dog.",)
    assert counts.num_images["train"] == 1
    assert counts.num_skipped == {
        "missing_images": 1,
        "unmatched_captions": 1,
        "malformed_rows": 0,
        "empty_captions": 2,
        "control_characters": 0,
        "uncaptioned_images": 1,
        "precanned_captions": 0,
        "rejected_captions": 0,
        "images_without_accepted_captions": 0,
    }


def test_both_images_with_the_same_id_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "5_000000000a.jpg", "5_000000000b.jpg")
    path = tmp_path / "captions.txt"
    path.write_text("image,caption\n5_000000000a.jpg,A\n5_000000000b.jpg,B\n")
    with pytest.raises(UserError) as error:
        prepare_by_file(tmp_path)
    message = str(error.value)
    assert "image id: 5 " in message
    assert f"5_000000000a.jpg ({path}:2)" in message
    assert f"5_000000000b.jpg ({path}:3)" in message


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ("image,caption\n../a.jpg,A\n", "outside this folder: '../a.jpg' ("),
        ("image,caption\n/etc/passwd,A\n", "outside this folder: '/etc/passwd' ("),
        ("image,caption\na.jpg, \n" + FOUR_CAPTIONS.removeprefix("image,caption\n"), "empty captions (1): "),
        ("image,caption\na.jpg,A\ne.jpg,B\n", "missing image files (1): e.jpg ("),
        (f"image,caption\na.jpg,A\n{'e' * 300},B\n", "missing image files (1): eee"),
        ("image,caption\na.jpg,A\ne\0.jpg,B\n", "missing image files (1): e"),
        ("image,caption\n", "no images in train and val and test"),
    ],
)
def test_faults_of_a_flickr8k_dataset(tmp_path: Path, captions: str, message: str) -> None:
    touch_four_images(tmp_path)
    (tmp_path / "captions.txt").write_text(captions)
    with pytest.raises(UserError) as error:
        prepare_by_file(tmp_path, splits=SEEDED | {"val": 0.1})
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [IMAGE, IMAGE], "annotations": [CAPTION]}, "same image id: 1 of "),
        ({"images": [IMAGE, IMAGE | {"id": 7}], "annotations": [CAPTION]}, "same image path: train/1.jpg of "),
        ({"images": [IMAGE], "annotations": []}, "images without captions (1): train/1.jpg ("),
        (
            {"images": [IMAGE], "annotations": [CAPTION, CAPTION | {"image_id": 5}]},
            "captions of unknown images (1): ",
        ),
    ],
)
def test_faults_of_a_coco_dataset(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    changes = write_three_coco_files(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        prepare_by_file(tmp_path, **changes)
    assert message in str(error.value)
    assert "train.json" in str(error.value)


def test_listed_image_without_captions_is_an_error(tmp_path: Path) -> None:
    touch_four_images(tmp_path)
    (tmp_path / "captions.txt").write_text(FOUR_CAPTIONS)
    for split, names in (("train", "a.jpg\nz.jpg\n"), ("val", "b.jpg"), ("test", "c.jpg")):
        (tmp_path / f"{split}.txt").write_text(names)
    with pytest.raises(UserError) as error:
        prepare_by_file(tmp_path, splits=LISTS)
    assert f"images without captions (1): z.jpg ({tmp_path / 'train.txt'}:2)" in str(error.value)


def test_only_the_first_of_many_faults_are_listed(tmp_path: Path) -> None:
    write_numbered_captions(tmp_path, list(range(9)))
    with pytest.raises(UserError, match=r"\(9\): 0_a\.jpg .*1_a\.jpg .*2_a\.jpg .*; and 6 more\."):
        prepare_by_file(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "nowhere"}, "nowhere: no such folder"),
        ({"images": "Images"}, "Images: no such folder"),
        ({"images": "../x"}, "'../x' must be a path below dataset.root"),
        ({"root": ""}, "dataset.root: must not be empty"),
        ({"root": "s3://data"}, "dataset.root: must be a local path, not the URL 's3://data'"),
        ({"root": "\\\\${x}"}, r"dataset.root: must not contain \${, which DVC replaces with ${"),
        ({"root": "a/images.dvc"}, "dataset.root: must not have the name of a DVC file, got 'a/images.dvc'"),
        ({"root": "dvc.yaml/"}, "dataset.root: must not have the name of a DVC file, got 'dvc.yaml/'"),
        ({"captions": []}, "dataset: captions must list at least one"),
        ({"captions": [{"file": "/x", "folder": ".", "split": None}]}, "'/x' must be a path below dataset.root"),
        ({"captions": [{"file": "x.txt", "folder": ".", "split": None}]}, "x.txt: no such file"),
        ({"splits": SEEDED | {"val": 0.8}}, "val + test must be <= 1, got 0.8 + 0.25"),
        ({"splits": {"by": "luck"}}, "dataset.splits.by must be one of"),
        ({"format": "flickr"}, "dataset.format must be 'coco', 'flickr8k' or 'karpathy', got \"flickr\""),
    ],
)
def test_invalid_params_are_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        prepare_by_file(tmp_path, **changes)
    assert message in str(error.value)


ODD_CAPTIONS = FOUR_CAPTIONS + "a.jpg\na.jpg,A dog\0 runs\nb.jpg,A \x1b]0;title\x07 cat\nb.jpg,nan\n"


def test_odd_captions_are_counted_and_nan_is_kept_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch_four_images(tmp_path)
    path = tmp_path / "captions.txt"
    path.write_text(ODD_CAPTIONS)
    records, counts = prepare_by_file(tmp_path, bad_captions="skip")
    assert records["a.jpg"].captions == ("A dog .",)
    assert records["b.jpg"].captions == ("A cat .", "nan")
    assert (counts.num_skipped["empty_captions"], counts.num_skipped["control_characters"]) == (1, 2)
    assert f"{path}:9 (nan)" in caplog.text


def test_control_characters_are_an_error_with_file_and_line(tmp_path: Path) -> None:
    touch_four_images(tmp_path)
    (tmp_path / "captions.txt").write_text(FOUR_CAPTIONS + "a.jpg,A dog\0 runs\n")
    with pytest.raises(UserError) as error:
        prepare_by_file(tmp_path)
    assert f"control characters (1): {tmp_path / 'captions.txt'}:6 ('\\x00')" in str(error.value)


def test_flickr30k_row_without_its_second_bar_is_named_or_counted(tmp_path: Path) -> None:
    touch_four_images(tmp_path)
    path = tmp_path / "results.csv"
    rows = "".join(f"{name}.jpg| 0| A dog, a big one .\n" for name in "abcd")
    path.write_text("image_name| comment_number| comment\n" + rows + "a.jpg| 1   A dog runs .\n")
    with pytest.raises(UserError) as error:
        prepare_by_file(tmp_path, path.name)
    assert f"{path}:6 (a.jpg)" in str(error.value)
    assert "dataset.bad_captions" in str(error.value)
    records, counts = prepare_by_file(tmp_path, path.name, bad_captions="skip")
    assert records["a.jpg"].captions == ("A dog, a big one .",)
    assert counts.num_skipped["malformed_rows"] == 1


def test_one_name_in_two_folders_gets_ids_from_the_whole_path(tmp_path: Path) -> None:
    names = ["x/5_000000000a.jpg", "y/5_000000000a.jpg", "x/6_000000000a.jpg", "y/7_000000000a.jpg"]
    touch(tmp_path, *names)
    (tmp_path / "captions.txt").write_text("image,caption\n" + "".join(f"{name},A dog .\n" for name in names))
    records, _ = prepare_by_file(tmp_path)
    assert [records[name].image_id for name in names] == [id_from_path(names[0]), id_from_path(names[1]), 6, 7]


def test_names_are_matched_to_files_in_any_unicode_normalization(tmp_path: Path) -> None:
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    touch(tmp_path, f"{nfd}/{nfd}.jpg", f"{nfc}.png", "c.jpg", "d.jpg")
    names = [f"{nfc}/{nfc}.jpg", f"{nfd}.png", "c.jpg", "d.jpg"]
    (tmp_path / "captions.txt").write_text("image,caption\n" + "".join(f"{name},A dog .\n" for name in names))
    records, _ = prepare_by_file(tmp_path)
    assert records.keys() == {f"{nfd}/{nfd}.jpg", f"{nfc}.png", "c.jpg", "d.jpg"}


def test_image_with_only_precanned_captions_is_left_out_and_counted(tmp_path: Path) -> None:
    changes = write_three_coco_files(tmp_path)
    precanned = CAPTION | {"is_precanned": True, "is_rejected": False}
    content = {
        "images": [IMAGE, {"id": 9, "file_name": "9.jpg"}],
        "annotations": [CAPTION, precanned, precanned | {"image_id": 9}],
    }
    touch(tmp_path, "train/9.jpg")
    (tmp_path / "train.json").write_text(json.dumps(content))
    records, counts = prepare_by_file(tmp_path, **changes)
    assert "train/9.jpg" not in records
    assert counts.num_skipped["precanned_captions"] == 2
    assert counts.num_skipped["images_without_accepted_captions"] == 1


def test_unmatched_list_entries_are_named_if_a_split_is_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch_four_images(tmp_path)
    (tmp_path / "captions.txt").write_text(FOUR_CAPTIONS)
    for split, names in (("train", "17\n"), ("val", "b\n"), ("test", "c\n")):
        (tmp_path / f"{split}.txt").write_text(names)
    _, counts = prepare_by_file(tmp_path, splits=LISTS, bad_captions="skip")
    assert counts.num_images == {"train": 0, "val": 1, "test": 1}
    assert re.search(r"no images in train .*17 \(.*train\.txt:1\)", caplog.text)


LINKED_FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "image folder": ("photos", {"images": "photos"}),
    "images": ("photos/a", {"images": "photos"}),
    "caption file": ("text", {"file": "text/captions.txt", "images": "photos"}),
    "split file": ("lists", {"splits": {"by": "json", "file": "lists/splits.json"}, "images": "photos"}),
}


def write_dataset_in_folders(root: Path) -> None:
    """Write a dataset with `photos/a/*.jpg`, `text/captions.txt`, `captions.txt` and `lists/splits.json`."""
    touch_four_images(root / "photos" / "a")
    for path in (root / "captions.txt", root / "text" / "captions.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("image,caption\n" + "".join(f"a/{name}.jpg,A dog .\n" for name in "abcd"))
    (root / "lists").mkdir()
    splits = {"train": ["a/a.jpg", "a/b.jpg"], "val": ["a/c.jpg"], "test": ["a/d.jpg"]}
    (root / "lists" / "splits.json").write_text(json.dumps(splits))


def replace_by_link(path: Path, target: Path) -> Path:
    """Move a file or folder to `target`, link to it, and return the link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("kind", LINKED_FOLDERS)
def test_a_linked_folder_below_the_root_is_an_error_until_its_files_are_linked(tmp_path: Path, kind: str) -> None:
    folder, changes = LINKED_FOLDERS[kind]
    root, target = tmp_path / "data", tmp_path / "other disk" / "x"
    write_dataset_in_folders(root)
    link = replace_by_link(root / folder, target)
    with pytest.raises(UserError) as error:
        prepare_by_file(root, **changes)
    message = str(error.value)
    assert f"{link} -> {target}" in message
    command = message[message.index("`") + 1 : message.rindex("`")]
    subprocess.run(command, shell=True, check=True)
    assert len(prepare_by_file(root, **changes)[0]) == 4


def test_links_that_dvc_follows_are_no_error(tmp_path: Path) -> None:
    write_dataset_in_folders(tmp_path / "data")
    root = replace_by_link(tmp_path / "data", tmp_path / "disk")
    replace_by_link(root / "photos" / "a" / "a.jpg", tmp_path / "elsewhere" / "a.jpg")
    replace_by_link(root / "captions.txt", root / "photos" / "captions.txt")
    for captions in ("captions.txt", "photos/captions.txt"):
        assert len(prepare_by_file(root, captions, images="photos")[0]) == 4


def test_links_to_folders_of_which_nothing_is_read_and_broken_links_are_no_error(tmp_path: Path) -> None:
    write_dataset_in_folders(tmp_path)
    replace_by_link(tmp_path / "text", tmp_path / "unused")
    for link, target in {"b": "a", "nowhere": "/nowhere", "loop": "loop"}.items():
        (tmp_path / "photos" / link).symlink_to(target)
    assert len(prepare_by_file(tmp_path, images="photos")[0]) == 4


@needs_real
def test_real_flickr8k_images() -> None:
    records, counts = prepare_by_file(REAL / "flickr", images="images", splits={"by": "json", "file": "splits.json"})
    assert asdict(counts) == {
        "num_images": {"train": 753, "val": 61, "test": 61},
        "num_captions": {"train": 3765, "val": 305, "test": 305},
        "num_unassigned_images": 0,
        "num_skipped": dict.fromkeys(counts.num_skipped, 0),
        "num_leaked_images": {"train": 0, "val": 0, "test": 0},
        "num_shared_captions": 0,
        "max_images_per_caption": 3,
    }
    assert records["1000268201_693b08cb0e.jpg"].captions[1] == "A girl going into a wooden building ."


@pytest.mark.slow
@needs_real
def test_real_flickr8k_captions_and_lists(tmp_path: Path) -> None:
    source = REAL / "text" / "flickr8k_captions.csv"
    with source.open(newline="") as file:
        names = {row["image"] for row in csv.DictReader(file)}
    touch(tmp_path, *names)
    for name in ("flickr8k_captions.csv", "flickr8k_train.txt", "flickr8k_val.txt", "flickr8k_test.txt"):
        (tmp_path / name).symlink_to(REAL / "text" / name)
    lists = {"by": "lists"} | {split: f"flickr8k_{split}.txt" for split in ("train", "val", "test")}
    records, counts = prepare_by_file(tmp_path, source.name, splits=lists)
    assert len({record.image_id for record in records.values()}) == len(names) == 7966
    assert counts.num_images == {"train": 6000, "val": 1091, "test": 875}
    assert sum(counts.num_captions.values()) == 39830


@needs_real
def test_real_coco_captions() -> None:
    changes = {"format": "coco", "images": "images"}
    records, counts = prepare_by_file(REAL / "coco", "captions_train2017_sample.json", **changes)
    assert counts.num_images == {"train": 40, "val": 20, "test": 20}
    assert sum(counts.num_captions.values()) == 400
    assert records["000000000790.jpg"].image_id == 790
