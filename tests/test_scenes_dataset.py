import json
import os
import signal
import subprocess
import sys
import time
from glob import glob
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.params import check, load
from pipeline.scenes.dataset import RenderParams, write_dataset
from tests.paths import ROOT

PARAMS = {
    "seed": 3,
    "duplicate_rate": 0.35,
    "image_size": 64,
    "num_train": 6,
    "num_val": 2,
    "num_test": 4,
    "held_out": [["red", "sphere"], ["blue", "cube"]],
}


def params(**changes: object) -> RenderParams:
    return check(PARAMS | changes, "render", RenderParams, "params.yaml")


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start_stage(folder: Path, num_workers: int) -> subprocess.Popen[bytes]:
    """Start the stage `render` with its output in `folder / "out"`."""
    params_file = folder / "params.yaml"
    params_file.write_text(json.dumps({"render": PARAMS}))
    flags = {"params": params_file, "out": folder / "out", "work": folder / "work", "num-workers": num_workers}
    command = [sys.executable, "-m", "stages.render_scenes"]
    for flag, value in flags.items():
        command += [f"--{flag}", str(value)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


def read_captions(dataset: Path, split: str) -> dict:
    return json.loads((dataset / f"captions_{split}.json").read_text())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    with write_dataset(params(), folder, num_workers=2) as finished:
        return finished


@pytest.mark.slow
def test_resume_after_a_kill_gives_the_same_bytes(dataset, tmp_path):
    process = start_stage(tmp_path, num_workers=1)
    finished: dict[Path, int] = {}
    while not finished:
        assert process.poll() is None, "the stage ended before the kill"
        time.sleep(0.002)
        names = glob("work/render/*/annotations/*.json", root_dir=tmp_path)
        finished = {tmp_path / name: (tmp_path / name).stat().st_mtime_ns for name in names}
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob("work/render/*/annotations/*.json"))) < 12

    assert start_stage(tmp_path, num_workers=2).wait() == 0
    assert read_files(tmp_path / "out") == read_files(dataset)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


@pytest.mark.slow
def test_damaged_images_of_the_work_folder_are_rendered_again(dataset, tmp_path):
    with write_dataset(params(), tmp_path / "work", num_workers=2):
        pass
    annotations = sorted(tmp_path.glob("work/render/*/annotations/*.json"))
    for index, content in enumerate([b"", b"\xff", b"{}", b"[" * 5000, annotations[5].read_bytes()]):
        annotations[index].write_bytes(content)
    next(tmp_path.glob("work/render/*/dataset/images/train_00002.jpg")).unlink()
    with write_dataset(params(), tmp_path / "work", num_workers=2) as finished:
        assert read_files(finished) == read_files(dataset)


@pytest.mark.slow
def test_an_image_that_cannot_be_written_is_an_error(tmp_path):
    with write_dataset(params(num_train=1), tmp_path, num_workers=1) as finished:
        image = finished / "images" / "train_00000.jpg"
    image.unlink()
    image.mkdir()
    with (
        pytest.raises(IsADirectoryError, match=image.name),
        write_dataset(params(num_train=1), tmp_path, num_workers=1),
    ):
        pass


@pytest.mark.slow
def test_an_image_does_not_depend_on_the_number_of_images(dataset, tmp_path):
    with write_dataset(params(num_train=1, num_val=3, num_test=1), tmp_path, num_workers=1) as finished:
        small, large = read_files(finished), read_files(dataset)
    shared = {"images/train_00000.jpg", "images/val_00000.jpg", "images/val_00001.jpg", "images/test_00000.jpg"}
    assert {name for name in small if small[name] == large.get(name)} == shared


@pytest.mark.slow
def test_files_are_in_coco_caption_format(dataset):
    ids = set()
    for split, num_images in [("train", 6), ("val", 2), ("test", 4)]:
        content = read_captions(dataset, split)
        images, annotations = content["images"], content["annotations"]
        assert set(content) == {"info", "licenses", "images", "annotations"}
        assert len(images) == num_images
        for image in images:
            with Image.open(dataset / "images" / image["file_name"]) as file:
                assert file.format == "JPEG"
                assert file.size == (image["width"], image["height"]) == (64, 64)
            captions = [annotation["caption"] for annotation in annotations if annotation["image_id"] == image["id"]]
            assert len(set(captions)) == 5
        ids |= {item["id"] for item in images + annotations}
    assert len(ids) == 12 + 60


@pytest.mark.slow
def test_boxes_contain_pixels_of_the_color_of_their_object(dataset):
    # For each color, a channel that is brighter than another.
    channels = {"red": (0, 1), "green": (1, 0), "blue": (2, 0), "purple": (2, 1), "yellow": (0, 2), "orange": (0, 2)}
    num_checked = 0
    for image in read_captions(dataset, "train")["images"]:
        with Image.open(dataset / "images" / image["file_name"]) as file:
            pixels = np.asarray(file).astype(int)
        for obj in image["objects"]:
            left, top, width, height = (round(value) for value in obj["box"])
            if obj["attributes"]["color"] in channels:
                bright, dark = channels[obj["attributes"]["color"]]
                crop = pixels[top : top + height, left : left + width]
                assert np.mean(crop[..., bright] > 1.3 * crop[..., dark]) > 0.3
                num_checked += 1
    assert num_checked >= 5


@pytest.mark.slow
def test_held_out_pairs_occur_in_every_third_test_image_only(dataset):
    held_out = {("red", "sphere"), ("blue", "cube")}

    def pairs(image):
        return {(obj["attributes"]["color"], obj["attributes"]["shape"]) for obj in image["objects"]}

    for split in ("train", "val"):
        for image in read_captions(dataset, split)["images"]:
            assert image["subset"] is None
            assert not pairs(image) & held_out
    test = read_captions(dataset, "test")["images"]
    assert [image["subset"] for image in test] == ["held-out", "seen", "seen", "held-out"]
    assert [len(pairs(image) & held_out) for image in test] == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"held_out": [["red", "ball"]]}, ["render.held_out.0.1", "'sphere'", "ball"]),
        ({"held_out": [["red", "ring"], ["red", "ring"]]}, ["held_out", "red ring", "2 times"]),
        (
            {"held_out": [["red", "ring"], ["red", "cone"], ["red", "cube"]]},
            ["held_out", "at most 2", "3 with red"],
        ),
        ({"image_size": 8}, ["render.image_size", "32", "got 8"]),
        ({"num_train": 0}, ["render.num_train", "1", "got 0"]),
    ],
)
def test_invalid_params_are_errors(changes, facts):
    with pytest.raises(UserError, match=r"^params.yaml: ") as error:
        params(**changes)
    assert all(fact in str(error.value) for fact in facts)


def test_params_of_the_repository_give_splits_of_sufficient_size():
    render_params = load(ROOT / "data" / "scenes" / "params.yaml", "render", RenderParams)
    assert render_params.num_train >= 2000
    assert min(render_params.num_val, render_params.num_test) >= 200
    assert len({shape for _, shape in render_params.held_out}) == len(render_params.held_out)


@pytest.mark.slow
def test_zero_workers_is_an_error(tmp_path):
    assert start_stage(tmp_path, num_workers=0).wait() == 2
    assert os.listdir(tmp_path) == ["params.yaml"]
