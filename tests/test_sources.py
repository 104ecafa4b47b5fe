import csv
import hashlib
import json
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.captions.records import Record, Thing, read_records
from pipeline.captions.sources.dataset import Counts, DatasetParams, prepare
from pipeline.captions.sources.parsed_file import id_from_name
from pipeline.errors import UserError
from pipeline.params import check

REPOSITORY = Path(__file__).parents[1]
REAL = REPOSITORY.parent / "shared" / "real"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real data in ../shared/real")

SEEDED = {"by": "seed", "seed": 7, "val": 0.25, "test": 0.25}
LISTS = {"by": "lists", "train": "train.txt", "val": "val.txt", "test": "test.txt"}


def params_section(folder: Path, file: str = "captions.txt", **changes: Any) -> dict[str, Any]:
    return {
        "format": "flickr8k",
        "root": str(folder),
        "images": ".",
        "captions": [{"file": file, "folder": ".", "split": None}],
        "splits": SEEDED,
        "missing_images": "error",
        "bad_captions": "error",
    } | changes


def prepared(folder: Path, *arguments: Any, **changes: Any) -> tuple[dict[str, Record], Counts]:
    """Records by file."""
    params = check(params_section(folder, *arguments, **changes), "dataset", DatasetParams, "params.yaml")
    records, counts = prepare(params)
    return {record.file: record for record in records}, counts


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def four_images(root: Path) -> None:
    touch(root, "a.jpg", "b.jpg", "c.jpg", "d.jpg")


FOUR_CAPTIONS = "image,caption\na.jpg,A dog .\nb.jpg,A cat .\nc.jpg,A cow .\nd.jpg,A pig .\n"


def coco_file(path: Path, images: list[dict[str, Any]], captions: list[tuple[int, str]]) -> None:
    annotations = [
        {"id": number, "image_id": image_id, "caption": caption} for number, (image_id, caption) in enumerate(captions)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations}))


def three_coco_files(root: Path) -> dict[str, Any]:
    for number, split in enumerate(("train", "val", "test"), start=1):
        touch(root, f"{split}/{number}.jpg")
        coco_file(root / f"{split}.json", [{"id": number, "file_name": f"{number}.jpg"}], [(number, "A dog.")])
    captions = [{"file": f"{split}.json", "folder": split, "split": split} for split in ("train", "val", "test")]
    return {"format": "coco", "captions": captions, "splits": None}


def test_coco_entries_become_records_with_boxes_as_fractions(tmp_path: Path) -> None:
    settings = three_coco_files(tmp_path)
    thing = {"attributes": {"shape": "cube"}, "box": [10, 20, 50, 40.0]}
    image = {"id": 3, "file_name": "3.jpg", "width": 100, "height": 80, "subset": "seen", "things": [thing]}
    coco_file(tmp_path / "test.json", [image], [(3, " A cube. \n"), (3, "Ein Würfel.")])
    records, counts = prepared(tmp_path, **settings)
    assert records["test/3.jpg"] == Record(
        image_id=3,
        file="test/3.jpg",
        split="test",
        captions=("A cube.", "Ein Würfel."),
        subset="seen",
        things=(Thing(attributes={"shape": "cube"}, box=(0.1, 0.25, 0.5, 0.5)),),
    )
    assert records["train/1.jpg"].subset is None
    assert counts.images == {"train": 1, "val": 1, "test": 1}
    assert counts.captions == {"train": 1, "val": 1, "test": 2}


def test_csv_captions_may_hold_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    four_images(tmp_path)
    extra = 'a.jpg,"A dog, a ""big"" one\nin two lines ."\n'
    (tmp_path / "captions.txt").write_bytes(b"\xef\xbb\xbf" + (FOUR_CAPTIONS + extra).encode())
    records, _ = prepared(tmp_path)
    assert records["a.jpg"].captions == ("A dog .", 'A dog, a "big" one\nin two lines .')


def test_official_flickr8k_form_leaves_out_what_no_list_names(tmp_path: Path) -> None:
    names = ["11_00000000ab.jpg", "12_00000000ab.jpg", "13_00000000ab.jpg", "14_00000000ab.jpg"]
    touch(tmp_path, *names)
    lines = [f"{name}#{number}\tCaption {number} , of it .\r\n" for name in names for number in range(5)]
    # The real file has captions of one image that does not exist, by a name like this.
    lines.append("11_00000000ab.jpg.1#0\tA stray .\r\n")
    (tmp_path / "token.txt").write_text("".join(lines), newline="")
    for split, name in zip(("train", "val", "test"), names, strict=False):
        (tmp_path / f"{split}.txt").write_text(f"{name}\n\n")
    records, counts = prepared(tmp_path, "token.txt", splits=LISTS)
    assert {record.file: (record.image_id, record.split) for record in records.values()} == {
        "11_00000000ab.jpg": (11, "train"),
        "12_00000000ab.jpg": (12, "val"),
        "13_00000000ab.jpg": (13, "test"),
    }
    assert records["12_00000000ab.jpg"].captions[4] == "Caption 4 , of it ."
    assert counts.left_out == 2


def test_karpathy_restval_is_trained_on_and_ids_are_cocos_where_given(tmp_path: Path) -> None:
    images = [
        {"filename": "x.jpg", "filepath": "val2014", "split": "restval", "cocoid": 9, "imgid": 0},
        {"filename": "2_000000000f.jpg", "split": "val", "imgid": 1},
        {"filename": "3_000000000f.jpg", "split": "test", "imgid": 2},
    ]
    for image in images:
        image["sentences"] = [{"raw": "A dog.", "tokens": ["a", "dog"]}]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    touch(tmp_path, "val2014/x.jpg", "2_000000000f.jpg", "3_000000000f.jpg")
    records, _ = prepared(tmp_path, "dataset.json", format="karpathy", splits=None)
    assert {file: (record.image_id, record.split) for file, record in records.items()} == {
        "val2014/x.jpg": (9, "train"),
        "2_000000000f.jpg": (2, "val"),
        "3_000000000f.jpg": (3, "test"),
    }


def test_ids_come_from_names_alone() -> None:
    assert id_from_name("Images/1000268201_693b08cb0e.jpg") == 1000268201
    assert id_from_name("holiday/1.png") == int(hashlib.sha256(b"holiday/1.png").hexdigest()[:12], 16)
    assert id_from_name("2258277193_586949ec62.jpg.1") != id_from_name("2258277193_586949ec62.jpg")
    assert id_from_name("20240311_142233.jpg") != id_from_name("20240311_142301.jpg")


def test_two_files_with_one_id_are_both_named(tmp_path: Path) -> None:
    names = ["5_000000000a.jpg", "5_000000000b.jpg"]
    touch(tmp_path, *names)
    (tmp_path / "captions.txt").write_text("image,caption\n5_000000000a.jpg,A\n5_000000000b.jpg,B\n")
    with pytest.raises(UserError, match=r"one image id: 5 of 5_0+a\.jpg \(.*line 2\) and of 5_0+b\.jpg \(.*line 3\)"):
        prepared(tmp_path)


def test_json_splits(tmp_path: Path) -> None:
    four_images(tmp_path)
    (tmp_path / "captions.txt").write_text(FOUR_CAPTIONS)
    lists = {"train": ["a.jpg", "d.jpg"], "val": ["b.jpg"], "test": ["c.jpg"]}
    (tmp_path / "splits.json").write_text(json.dumps(lists))
    records, _ = prepared(tmp_path, splits={"by": "json", "file": "splits.json"})
    assert {file: record.split for file, record in records.items()} == {
        file: split for split, files in lists.items() for file in files
    }


def write_numbered(root: Path, numbers: list[int]) -> None:
    rows = "".join(f"{number}_a.jpg,Caption .\n" for number in numbers)
    (root / "captions.txt").write_text("image,caption\n" + rows)


@given(st.permutations(range(40)), st.integers(min_value=0, max_value=9))
def test_a_seeded_division_has_exact_counts_whatever_the_order(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], seed: int
) -> None:
    root = tmp_path_factory.getbasetemp() / "numbered"
    touch(root, *(f"{number}_a.jpg" for number in range(40)))
    splits = {"by": "seed", "seed": seed, "val": 0.1, "test": 0.26}
    write_numbered(root, order)
    records, counts = prepared(root, splits=splits)
    write_numbered(root, sorted(order))
    assert prepared(root, splits=splits)[0] == records
    assert counts.images == {"train": 26, "val": 4, "test": 10}


def test_a_seeded_division_changes_with_the_seed_and_hardly_with_one_image_more(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}_a.jpg" for number in range(41)))
    write_numbered(tmp_path, list(range(40)))
    before = {file: record.split for file, record in prepared(tmp_path)[0].items()}
    other = prepared(tmp_path, splits=SEEDED | {"seed": 8})[0]
    assert sum(other[file].split != split for file, split in before.items()) > 10
    write_numbered(tmp_path, list(range(41)))
    after = prepared(tmp_path)[0]
    assert sum(after[file].split != split for file, split in before.items()) <= 2


def test_one_file_may_be_divided_while_another_has_its_split(tmp_path: Path) -> None:
    settings = three_coco_files(tmp_path)
    touch(tmp_path, "val/4.jpg")
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in (2, 4)]
    coco_file(tmp_path / "val.json", images, [(2, "A dog."), (4, "A cat.")])
    settings["captions"] = [
        {"file": "train.json", "folder": "train", "split": "train"},
        {"file": "val.json", "folder": "val", "split": None},
    ]
    settings["splits"] = {"by": "seed", "seed": 1, "val": 0.5, "test": 0.5}
    assert prepared(tmp_path, **settings)[1].images == {"train": 1, "val": 1, "test": 1}


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (b"a.jpg,A dog .\n", "captions.txt, line 1: wanted the header 'image,caption'"),
        (b"", "captions.txt, line 1: wanted the header 'image,caption'"),
        (
            b"image,caption\na.jpg,A dog, big\nb.jpg\n",
            "line 2 has 3; line 3 has 1; quote captions with commas",
        ),
        (b"image,caption\na.jpg,caf\xe9\n", "captions.txt, line 2: byte 0xe9 is not UTF-8; convert the file"),
        (b'image,caption\na.jpg,A\nb.jpg,"A dog\n', "captions.txt, line 3: is no CSV row"),
        (b"a.jpg#0\tA\nb.jpg A cat\n", "line 2 is 'b.jpg A cat'"),
        (
            b"image,caption\n../a.jpg,A\n",
            "must lie below the image folder, got '../a.jpg' (",
        ),
        (b"image,caption\n/etc/passwd,A\n", "must lie below the image folder, got '/etc/passwd' ("),
        (b"image,caption\na.jpg, \n" + FOUR_CAPTIONS[14:].encode(), "empty captions, 1 in all: "),
        (b"image,caption\na.jpg,A\ne.jpg,B\n", "images not found, 1 in all: e.jpg ("),
        (b"image,caption\na.jpg,A\nb.jpg,B\n", "no image in val and test"),
        (b"image,caption\n", "no image in train and val and test"),
    ],
)
def test_faults_of_a_flickr8k_file(tmp_path: Path, captions: bytes, message: str) -> None:
    four_images(tmp_path)
    (tmp_path / "captions.txt").write_bytes(captions)
    with pytest.raises(UserError) as error:
        prepared(tmp_path, splits=SEEDED | {"val": 0.1})
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


IMAGE = {"id": 1, "file_name": "1.jpg"}
CAPTION = {"id": 0, "image_id": 1, "caption": "A dog."}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "train.json: is no COCO caption file: Invalid JSON"),
        ("[]", "train.json: is no COCO caption file: Input should be"),
        ({"images": [IMAGE]}, "annotations: Field required"),
        (
            {"images": [IMAGE], "annotations": [{"id": 0, "image_id": 1}]},
            "annotations[0].caption: Field required",
        ),
        ({"images": [{"id": "1", "file_name": "1.jpg"}], "annotations": []}, "images[0].id: Input should be"),
        ({"images": [IMAGE, IMAGE], "annotations": [CAPTION]}, "two images have one image id: 1 of "),
        (
            {"images": [IMAGE, IMAGE | {"id": 7}], "annotations": [CAPTION]},
            "two images have one file: train/1.jpg of ",
        ),
        ({"images": [IMAGE], "annotations": []}, "images without captions, 1 in all: train/1.jpg ("),
        (
            {"images": [IMAGE], "annotations": [CAPTION, CAPTION | {"image_id": 5}]},
            "captions of images that the file does not list, 1 in all: ",
        ),
        (
            {
                "images": [IMAGE | {"things": [{"attributes": {}, "box": [0, 0, 1, 1]}]}],
                "annotations": [CAPTION],
            },
            "train.json, image 1: has boxes but its size is 0 x 0",
        ),
    ],
)
def test_faults_of_a_coco_file(tmp_path: Path, content: Any, message: str) -> None:
    settings = three_coco_files(tmp_path)
    (tmp_path / "train.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as error:
        prepared(tmp_path, **settings)
    assert message in str(error.value)
    assert "train.json" in str(error.value)


def test_karpathy_file_with_an_unknown_split(tmp_path: Path) -> None:
    image = {"filename": "a.jpg", "split": "dev", "sentences": []}
    (tmp_path / "dataset.json").write_text(json.dumps({"images": [image]}))
    with pytest.raises(UserError, match=r"dataset\.json: is no Karpathy dataset file: images\[0\]\.split: "):
        prepared(tmp_path, "dataset.json", format="karpathy", splits=None)


def test_many_faults_are_counted_and_the_first_few_shown(tmp_path: Path) -> None:
    write_numbered(tmp_path, list(range(9)))
    with pytest.raises(UserError, match=r"9 in all: 0_a\.jpg .*1_a\.jpg .*2_a\.jpg .*; and 6 more; mend"):
        prepared(tmp_path)


def test_skipped_faults_are_counted_by_kind(tmp_path: Path) -> None:
    settings = three_coco_files(tmp_path) | {"missing_images": "skip", "bad_captions": "skip"}
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in (1, 4, 5)]
    captions = [(1, "A dog."), (1, "  "), (4, "Not there."), (4, "Nor this."), (5, ""), (6, "Whose?")]
    coco_file(tmp_path / "train.json", images, captions)
    touch(tmp_path, "train/5.jpg")
    records, counts = prepared(tmp_path, **settings)
    assert records["train/1.jpg"].captions == ("A dog.",)
    assert counts.images["train"] == 1
    assert counts.skipped == {
        "missing_images": 1,
        "captions_of_unknown_images": 1,
        "empty_captions": 2,
        "images_without_captions": 1,
    }


@pytest.mark.parametrize(
    ("train", "splits", "message"),
    [
        (
            "a.jpg\nb.jpg\n",
            LISTS,
            r"b\.jpg is in train \(.*train\.txt, line 2\) and in val \(.*val\.txt, line 1\)",
        ),
        ("a.jpg\nz.jpg\n", LISTS, r"images without captions, 1 in all: z\.jpg \(.*train\.txt, line 2\)"),
        ("a.jpg", LISTS | {"val": "dev.txt"}, r"dev\.txt: no such file; put it there, or mend dataset\.root"),
        ("a.jpg", {"by": "json", "file": "val.txt"}, r"val\.txt: is no JSON object of file names by split"),
        ("a.jpg", None, r"captions\.txt, line 2: nothing says this image's split, nor that of 3 others"),
    ],
)
def test_faults_of_split_lists(tmp_path: Path, train: str, splits: Any, message: str) -> None:
    four_images(tmp_path)
    (tmp_path / "captions.txt").write_text(FOUR_CAPTIONS)
    for name, content in (("train", train), ("val", "b.jpg"), ("test", "c.jpg")):
        (tmp_path / f"{name}.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, splits=splits)


def test_an_image_of_one_split_that_a_list_puts_in_another(tmp_path: Path) -> None:
    settings = three_coco_files(tmp_path)
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.txt").write_text("train/1.jpg" if split == "val" else "")
    with pytest.raises(UserError, match=r"train/1\.jpg is in train \(its caption file\) and in val"):
        prepared(tmp_path, **settings | {"splits": LISTS})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "nowhere"}, "nowhere: no such folder; put the dataset there, or mend dataset.root"),
        ({"images": "Images"}, "Images: no such folder"),
        ({"images": "../x"}, "'../x' must be a path below dataset.root"),
        ({"captions": []}, "captions must name at least one caption file"),
        (
            {"captions": [{"file": "/x", "folder": ".", "split": None}]},
            "'/x' must be a path below dataset.root",
        ),
        ({"captions": [{"file": "x.txt", "folder": ".", "split": None}]}, "x.txt: no such file"),
        (
            {"splits": SEEDED | {"val": 0.8}},
            "val and test must not be more than 1 together, got 0.8 and 0.25",
        ),
        ({"splits": {"by": "luck"}}, "dataset.splits Input tag 'luck'"),
        ({"format": "flickr"}, "dataset.format must be 'coco', 'flickr8k' or 'karpathy', got \"flickr\""),
    ],
)
def test_faults_of_the_params(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        prepared(tmp_path, **changes)
    assert message in str(error.value)


def run_stage(folder: Path, params: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.prepare_captions", "--params", str(params)]
    command += ["--out", str(folder / "prepared"), "--metrics", str(folder / "prepare.json")]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_the_stage_writes_the_same_bytes_for_any_order_of_rows(tmp_path: Path) -> None:
    data = tmp_path / "data"
    touch(data, *(f"{number}_a.jpg" for number in range(12)))
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps({"dataset": params_section(data)}))
    outputs = []
    for order in (list(range(12)), random.Random(1).sample(range(12), 12)):
        write_numbered(data, order)
        done = run_stage(tmp_path, params)
        assert done.returncode == 0, done.stderr
        outputs.append([(tmp_path / name).read_bytes() for name in ("prepared/records.jsonl", "prepare.json")])
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0][1])["images"] == {"train": 6, "val": 3, "test": 3}
    assert {path.name for path in tmp_path.iterdir()} == {"data", "params.yaml", "prepared", "prepare.json"}


def test_the_stage_ends_with_2_and_keeps_what_was_published(tmp_path: Path) -> None:
    data = tmp_path / "data"
    four_images(data)
    (data / "captions.txt").write_text(FOUR_CAPTIONS)
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps({"dataset": params_section(data)}))
    assert run_stage(tmp_path, params).returncode == 0
    (data / "b.jpg").unlink()
    failed = run_stage(tmp_path, params)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "b.jpg" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert len(read_records(tmp_path / "prepared")) == 4


@needs_real
def test_real_flickr8k_photographs() -> None:
    records, counts = prepared(REAL / "flickr", images="images", splits={"by": "json", "file": "splits.json"})
    assert asdict(counts) == {
        "images": {"train": 753, "val": 61, "test": 61},
        "captions": {"train": 3765, "val": 305, "test": 305},
        "left_out": 0,
        "skipped": dict.fromkeys(counts.skipped, 0),
    }
    assert records["1000268201_693b08cb0e.jpg"].captions[1] == "A girl going into a wooden building ."


@needs_real
def test_real_flickr8k_captions_and_ids(tmp_path: Path) -> None:
    source = REAL / "text" / "flickr8k_captions.csv"
    with source.open(newline="") as file:
        names = {row["image"] for row in csv.DictReader(file)}
    touch(tmp_path, *names)
    for name in ("flickr8k_captions.csv", "flickr8k_train.txt", "flickr8k_val.txt", "flickr8k_test.txt"):
        (tmp_path / name).symlink_to(REAL / "text" / name)
    lists = {"by": "lists"} | {split: f"flickr8k_{split}.txt" for split in ("train", "val", "test")}
    records, counts = prepared(tmp_path, source.name, splits=lists)
    assert len({record.image_id for record in records.values()}) == len(names) == 7966
    assert counts.images == {"train": 6000, "val": 1091, "test": 875}
    assert sum(counts.captions.values()) == 39830


@needs_real
def test_real_coco() -> None:
    changes = {"format": "coco", "images": "images"}
    records, counts = prepared(REAL / "coco", "captions_train2017_sample.json", **changes)
    assert counts.images == {"train": 40, "val": 20, "test": 20}
    assert sum(counts.captions.values()) == 400
    assert records["000000000790.jpg"].image_id == 790
