"""Small datasets on disk, in every source format, for the tests of `pipeline.captions.sources`."""

import json
from pathlib import Path
from typing import Any

from pipeline.captions.records import Record
from pipeline.captions.sources.dataset import DatasetParams, PreparedCounts, prepare
from pipeline.params import check

SEEDED = {"by": "seed", "seed": 7, "val": 0.25, "test": 0.25}
LISTS = {"by": "lists", "train": "train.txt", "val": "val.txt", "test": "test.txt"}
FOUR_CAPTIONS = "image,caption\na.jpg,A dog .\nb.jpg,A cat .\nc.jpg,A cow .\nd.jpg,A pig .\n"
"""A caption file of the images that `touch_four_images` creates."""


def dataset_section(root: Path, /, file: str = "captions.txt", **changes: Any) -> dict[str, Any]:
    """Section `dataset` of a Flickr8k dataset with random splits, with some keys changed."""
    return {
        "format": "flickr8k",
        "root": str(root),
        "images": ".",
        "captions": [{"file": file, "folder": ".", "split": None}],
        "splits": SEEDED,
        "missing_images": "error",
        "bad_images": "error",
        "bad_captions": "error",
    } | changes


def prepare_by_file(root: Path, /, *arguments: Any, **changes: Any) -> tuple[dict[str, Record], PreparedCounts]:
    """Prepare the dataset of `dataset_section` with the same arguments, and key the records by file."""
    params = check(dataset_section(root, *arguments, **changes), "dataset", DatasetParams, "params.yaml")
    records, counts, _ = prepare(params)
    return {record.file: record for record in records}, counts


def touch(root: Path, *names: str) -> None:
    """Create empty image files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def touch_four_images(root: Path) -> None:
    touch(root, "a.jpg", "b.jpg", "c.jpg", "d.jpg")


def write_numbered_captions(root: Path, indices: list[int]) -> None:
    """Write a caption file of the images `0_a.jpg`, `1_a.jpg` and so on, in this order."""
    rows = "".join(f"{index}_a.jpg,Caption .\n" for index in indices)
    (root / "captions.txt").write_text("image,caption\n" + rows)


def write_coco(path: Path, images: list[dict[str, Any]], captions: list[tuple[int, str]]) -> None:
    """Write a COCO caption file, from pairs of image id and caption."""
    annotations = [
        {"id": index, "image_id": image_id, "caption": caption} for index, (image_id, caption) in enumerate(captions)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations}))


def write_three_coco_files(root: Path) -> dict[str, Any]:
    """Write a COCO dataset with one image per split and return its keys of `dataset_section`."""
    for image_id, split in enumerate(("train", "val", "test"), start=1):
        touch(root, f"{split}/{image_id}.jpg")
        write_coco(root / f"{split}.json", [{"id": image_id, "file_name": f"{image_id}.jpg"}], [(image_id, "A dog.")])
    captions = [{"file": f"{split}.json", "folder": split, "split": split} for split in ("train", "val", "test")]
    return {"format": "coco", "captions": captions, "splits": None}
