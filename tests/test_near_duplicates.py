"""Near-duplicates among the images of a feature store."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from pipeline.captions.records import Record, Split
from pipeline.errors import UserError
from pipeline.features.encoding import encode
from pipeline.features.near_duplicates import (
    MIN_SIMILARITY,
    NEAR_DUPLICATES_FILE,
    NearDuplicate,
    find_near_duplicates,
    read_near_duplicates,
    write_near_duplicates,
)
from pipeline.features.store import FeatureStore, write_index, write_shard
from tests.factories import encode_params, small_spec
from tests.feature_stores import write_store
from tests.paths import REAL

SPEC = small_spec(grid_height=6, grid_width=5, channels=16)
PHOTOS = REAL / "flickr/images"
WEIGHTS = REAL / "weights/resnet18-imagenet-to-layer3.pth"


def random_grids(num_images: int) -> np.ndarray:
    """Return grids that share most of their values, as those of images do."""
    rng = np.random.default_rng(0)
    common = rng.random((1, 30, 16)) * 5
    return common + rng.random((num_images, 1, 16)) * 3 + rng.random((num_images, 30, 16))


def find(folder: Path, grids: np.ndarray, splits: list[Split]) -> tuple[NearDuplicate, ...]:
    store = write_store(folder, SPEC, range(len(grids)), grids.astype(np.float16))
    return find_near_duplicates(store, dict(enumerate(splits)), "")


def noisy(grid: np.ndarray, std: float) -> np.ndarray:
    return grid + np.random.default_rng(1).normal(0, std, grid.shape)


def test_copies_in_other_splits_are_found(tmp_path: Path) -> None:
    grids = random_grids(400)
    splits: list[Split] = ["train"] * 300 + ["val"] * 50 + ["test"] * 50
    grids[310] = noisy(grids[7], 0.05)  # val and train
    grids[360] = noisy(grids[9], 0.05)  # test and train
    grids[370] = noisy(grids[330], 0.05)  # test and val
    grids[20] = noisy(grids[21], 0.05)  # both in train
    grids[380] = noisy(grids[381], 0.05)  # both in test

    found = find(tmp_path, grids, splits)

    assert {(pair.image_id, pair.other_id) for pair in found} == {(310, 7), (330, 370), (360, 9), (370, 330)}
    assert all(MIN_SIMILARITY <= pair.similarity < 1 for pair in found)


def test_the_most_similar_copy_is_named(tmp_path: Path) -> None:
    grids = random_grids(40)
    splits: list[Split] = ["train"] * 30 + ["test"] * 10
    grids[:20] = [noisy(grids[35], 0.1) for _ in range(20)]
    grids[11] = noisy(grids[35], 0.001)

    (pair,) = find(tmp_path, grids, splits)

    assert (pair.image_id, pair.other_id, pair.similarity) == (35, 11, 1)


@pytest.mark.parametrize("splits", [["train"] * 4, ["test"] * 4, ["val", "val", "val", "val"]])
def test_one_split_has_no_near_duplicates(splits: list[Split], tmp_path: Path) -> None:
    assert find(tmp_path, np.repeat(random_grids(1), 4, axis=0), splits) == ()


@pytest.mark.parametrize("splits", [["train", "train", "test", "test"], ["val", "val", "test", "test"]])
def test_a_split_may_be_missing(splits: list[Split], tmp_path: Path) -> None:
    grids = random_grids(4)
    grids[3] = noisy(grids[0], 0.01)
    assert (3, 0) in {(pair.image_id, pair.other_id) for pair in find(tmp_path, grids, splits)}


def test_grids_of_one_value_have_no_near_duplicates(tmp_path: Path) -> None:
    assert find(tmp_path, np.ones((8, 30, 16)), ["train"] * 4 + ["test"] * 4) == ()


def test_images_with_the_same_file_are_not_near_duplicates(tmp_path: Path) -> None:
    grids = random_grids(10).astype(np.float16)
    digests = {image_id: f"{image_id % 10:064x}" for image_id in range(11)}  # 10 is a copy of 0
    keys = [(digests[image_id], "whole") for image_id in range(10)]
    write_index(tmp_path, SPEC, ("whole",), [write_shard(tmp_path, SPEC, range(10), keys, grids)], digests)
    splits: dict[int, Split] = {image_id: "test" if image_id == 10 else "train" for image_id in range(11)}

    assert find_near_duplicates(FeatureStore(tmp_path), splits, "") == ()


def test_the_file_is_read_as_written(tmp_path: Path) -> None:
    pairs = (
        NearDuplicate(image_id=3, other_id=1, similarity=0.875),
        NearDuplicate(image_id=4, other_id=1, similarity=1),
    )
    write_near_duplicates(tmp_path, pairs)
    assert read_near_duplicates(tmp_path) == pairs

    path = tmp_path / NEAR_DUPLICATES_FILE
    path.write_text(path.read_text().replace("0.875", "0.876"))
    with pytest.raises(UserError, match=r"near_duplicates\.json: was altered"):
        read_near_duplicates(tmp_path)
    path.write_text(json.dumps({"schema": "gridcap.near_duplicates", "schema_version": 1}))
    with pytest.raises(UserError, match="near_duplicates"):
        read_near_duplicates(tmp_path)


def changed(photo: Path, name: str) -> bytes:
    image = Image.open(photo).convert("RGB")
    if name == "larger":
        image = image.resize((image.width * 2, image.height * 2))
    if name == "brighter":
        image = ImageEnhance.Brightness(image).enhance(1.2)
    file = io.BytesIO()
    image.save(file, "PNG") if name == "larger" else image.save(file, "JPEG", quality=50 if name == "saved" else 90)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.is_file(), reason="needs photographs and weights in ../shared/real")
def test_copies_of_photographs_are_found_and_other_photographs_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = sorted(PHOTOS.iterdir())[:60]
    contents: list[tuple[Split, bytes]] = [("train", photo.read_bytes()) for photo in photos[:40]]
    contents += [("test", photo.read_bytes()) for photo in photos[40:]]
    contents += [("test", changed(photos[index], name)) for index, name in enumerate(("saved", "larger", "brighter"))]
    contents += [("val", photos[5].read_bytes())]
    records = []
    for image_id, (split, content) in enumerate(contents):
        (tmp_path / f"{image_id}").write_bytes(content)
        records.append(Record(image_id=image_id, file=f"{image_id}", split=split, captions=("a photo",)))
    params = encode_params(WEIGHTS, layer="layer3", image_size=224)

    with encode(records, tmp_path, params, tmp_path / "work", torch.device("cpu"), num_threads=2) as result:
        found = read_near_duplicates(result.store)

    assert [(pair.image_id, pair.other_id) for pair in found] == [(60, 0), (61, 1), (62, 2)]
    assert result.metrics["test_num_near_duplicates"] == 3
    assert result.metrics["val_num_near_duplicates"] == 0
    assert "(3): 60 (test) and 0 (train); 61 (test) and 1 (train)" in caplog.text
