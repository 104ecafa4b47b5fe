import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.params import check, load
from pipeline.scenes.dataset import RenderParams, write_dataset

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "seed": 3,
    "alike": 0.35,
    "size": 64,
    "train": 6,
    "val": 2,
    "test": 4,
    "held_out": [["red", "sphere"], ["blue", "cube"]],
}


def params(**changes: object) -> RenderParams:
    return check(SETTINGS | changes, "render", RenderParams, "params.yaml")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stage(folder: Path, name: str, workers: int) -> subprocess.Popen[bytes]:
    settings = folder / "params.yaml"
    settings.write_text(json.dumps({"render": SETTINGS}))
    flags = {"params": settings, "out": folder / name, "work": folder / "work", "workers": workers}
    command = [sys.executable, "-m", "stages.render_scenes"]
    for flag, value in flags.items():
        command += [f"--{flag}", str(value)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_dataset(params(), folder / "out", folder / "work", workers=2)
    return folder / "out"


def coco(dataset: Path, split: str) -> dict:
    return json.loads((dataset / f"captions_{split}.json").read_text())


def test_the_stage_killed_and_run_again_gives_the_same_bytes(dataset, tmp_path):
    killed = stage(tmp_path, "out", workers=1)
    finished: dict[Path, int] = {}
    while not finished:
        assert killed.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
        finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("work/render/*/facts/*.json")}
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob("work/render/*/facts/*.json"))) < 12

    assert stage(tmp_path, "out", workers=2).wait() == 0
    assert content(tmp_path / "out") == content(dataset)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_a_picture_does_not_depend_on_how_many_there_are(dataset, tmp_path):
    write_dataset(params(train=1, val=3, test=1), tmp_path / "out", tmp_path / "work", workers=1)
    few, many = content(tmp_path / "out"), content(dataset)
    shared = {"images/train_00000.jpg", "images/val_00000.jpg", "images/val_00001.jpg", "images/test_00000.jpg"}
    assert {name for name in few if few[name] == many.get(name)} == shared


def test_the_files_are_in_cocos_caption_format(dataset):
    ids = set()
    for split, count in [("train", 6), ("val", 2), ("test", 4)]:
        known = coco(dataset, split)
        assert set(known) == {"info", "licenses", "images", "annotations"}
        assert len(known["images"]) == count
        for image in known["images"]:
            with Image.open(dataset / "images" / image["file_name"]) as file:
                assert file.format == "JPEG"
                assert file.size == (image["width"], image["height"]) == (64, 64)
            captions = [one["caption"] for one in known["annotations"] if one["image_id"] == image["id"]]
            assert len(set(captions)) == 5
        ids |= {image["id"] for image in known["images"]} | {one["id"] for one in known["annotations"]}
    assert len(ids) == 12 + 60


def test_boxes_lie_on_the_things_that_they_name(dataset):
    strong = {"red": (0, 1), "green": (1, 0), "blue": (2, 0), "purple": (2, 1), "yellow": (0, 2), "orange": (0, 2)}
    checked = 0
    for image in coco(dataset, "train")["images"]:
        with Image.open(dataset / "images" / image["file_name"]) as file:
            pixels = np.asarray(file).astype(int)
        for thing in image["objects"]:
            left, top, width, height = (round(part) for part in thing["box"])
            more, less = strong.get(thing["attributes"]["color"], (None, None))
            if more is not None:
                inside = pixels[top : top + height, left : left + width]
                assert np.mean(inside[..., more] > 1.3 * inside[..., less]) > 0.3
                checked += 1
    assert checked >= 5


def test_held_out_pairs_are_kept_for_every_third_picture_of_test(dataset):
    held_out = {("red", "sphere"), ("blue", "cube")}

    def pairs(image):
        return {(thing["attributes"]["color"], thing["attributes"]["shape"]) for thing in image["objects"]}

    for split in ("train", "val"):
        for image in coco(dataset, split)["images"]:
            assert image["subset"] is None
            assert not pairs(image) & held_out
    test = coco(dataset, "test")["images"]
    assert [image["subset"] for image in test] == ["held-out", "seen", "seen", "held-out"]
    assert [len(pairs(image) & held_out) for image in test] == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": [["red", "ball"]]}, "render.held_out.0.1 must be 'sphere', "),
        ({"held_out": [["red", "ring"], ["red", "ring"]]}, "must name a pair once, got 2 times red ring"),
        ({"held_out": [["red", "ring"], ["red", "cone"], ["red", "cube"]]}, "may have 'red', got 3"),
        ({"size": 8}, "render.size must be greater than or equal to 32, got 8"),
        ({"train": 0}, "render.train must be greater than or equal to 1, got 0"),
    ],
)
def test_params_are_checked(changes, message):
    with pytest.raises(UserError, match=r"^params.yaml: ") as caught:
        params(**changes)
    assert message in str(caught.value)


def test_the_projects_own_params_hold_enough_for_every_split():
    own = load(ROOT / "data" / "scenes" / "params.yaml", "render", RenderParams)
    assert own.train >= 2000
    assert min(own.val, own.test) >= 200
    assert len({shape for _, shape in own.held_out}) == len(own.held_out)


def test_workers_must_be_positive(tmp_path):
    assert stage(tmp_path, "out", workers=0).wait() == 2
    assert os.listdir(tmp_path) == ["params.yaml"]
