"""Recipes: from a server on loopback with miniatures of the real archives to records of the prepared dataset."""

import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline import downloads
from pipeline.captions.records import Record
from pipeline.captions.sources.dataset import DatasetParams, prepare
from pipeline.errors import UserError
from pipeline.params import load
from pipeline.presets import find_preset, use
from pipeline.recipes import find_recipe, read_recipe
from tests.command_line import gridcap
from tests.file_server import FileServer, file_server
from tests.image_files import encode_jpeg, red_blue_image
from tests.paths import ROOT

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
SPLITS = ("train", "train", "val", "test")
NAMES = [f"{index}000_{index}.jpg" for index in range(1, 5)]
MACOSX = {"__MACOSX/._x": b"", "__MACOSX/Flicker8k_Dataset/._1000_1.jpg": b"Mac OS X"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    monkeypatch.setattr(downloads, "RETRY_DELAY", 0.001)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    with file_server() as server:
        yield server


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for folder in sorted({name.partition("/")[0] for name in files if "/" in name}):
            archive.mkdir(folder)
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def photos(folder: str, names: list[str]) -> dict[str, bytes]:
    return {f"{folder}/{name}": encode_jpeg(red_blue_image(8 + index, 8)) for index, name in enumerate(names)}


def karpathy_zip() -> bytes:
    coco = [(f"COCO_{year}_{index:012}.jpg", year, index) for index, year in enumerate(("train2014", "val2014") * 2)]
    splits = ("train", "restval", "val", "test")
    sentences = [{"raw": "A dog runs."}, {"raw": "A brown dog."}]
    flickr = [
        {"filename": name, "split": split, "sentences": sentences} for name, split in zip(NAMES, SPLITS, strict=True)
    ]
    return zipped(
        {
            "dataset_coco.json": json.dumps(
                {
                    "images": [
                        {"filename": name, "filepath": year, "cocoid": index, "split": split, "sentences": sentences}
                        for (name, year, index), split in zip(coco, splits, strict=True)
                    ]
                }
            ).encode(),
            "dataset_flickr8k.json": json.dumps({"images": flickr, "dataset": "flickr8k"}).encode(),
            "dataset_flickr30k.json": json.dumps({"images": flickr, "dataset": "flickr30k"}).encode(),
        }
    )


def coco_annotations(year: int) -> bytes:
    files = {}
    for index, split in enumerate(("train", "val")):
        images = [{"id": 10 * index + i, "file_name": f"{10 * index + i:012}.jpg"} for i in range(4)]
        captions = [
            {"id": 100 * index + i, "image_id": image["id"], "caption": "A dog runs."} for i, image in enumerate(images)
        ]
        content = json.dumps({"images": images, "annotations": captions}).encode()
        files[f"annotations/captions_{split}{year}.json"] = content
        files[f"annotations/instances_{split}{year}.json"] = b"{}"
    return zipped(files)


def coco_images(split: str, first: int) -> bytes:
    return zipped(photos(split, [f"{first + i:012}.jpg" for i in range(4)]))


def flickr8k_archives(images: dict[str, bytes], splits: Sequence[str], captions: Sequence[str]) -> dict[str, bytes]:
    """Archives of Flickr8k: images by name, the split of each, and a caption of each, which it has five times."""
    captioned = [*zip(images, captions, strict=True), ("2258277193_586949ec62.jpg.1", "A dog runs .")]
    token = "".join(f"{name}#{i}\t{caption}\n" for name, caption in captioned for i in range(5))
    lists = {
        f"Flickr_8k.{split}Images.txt": "".join(
            f"{name}\n" for name, of in zip(images, splits, strict=True) if of == division
        ).encode()
        for split, division in (("train", "train"), ("dev", "val"), ("test", "test"))
    }
    return {
        "Flickr8k_Dataset.zip": zipped({f"Flicker8k_Dataset/{name}": image for name, image in images.items()} | MACOSX),
        "Flickr8k_text.zip": zipped(
            {"Flickr8k.token.txt": token.encode(), "readme.txt": b"", "CrowdFlowerAnnotations.txt": b""}
            | lists
            | {"__MACOSX/._Flickr8k.token.txt": b"Mac OS X"}
        ),
    }


def miniatures() -> dict[str, bytes]:
    """Archives with the names and layouts of the real ones."""
    images = {name: encode_jpeg(red_blue_image(8 + index, 8)) for index, name in enumerate(NAMES)}
    coco2014 = {
        f"{year}2014.zip": zipped(photos(f"{year}2014", [f"COCO_{year}2014_{i:012}.jpg" for i in indices]))
        for year, indices in (("train", (0, 2)), ("val", (1, 3)))
    }
    return {
        **flickr8k_archives(images, SPLITS, ["A dog runs ."] * len(NAMES)),
        "flickr30k-images.tar.gz": tarred(photos("flickr30k-images", NAMES)),
        "caption_datasets.zip": karpathy_zip(),
        "train2017.zip": coco_images("train2017", 0),
        "val2017.zip": coco_images("val2017", 10),
        "annotations_trainval2017.zip": coco_annotations(2017),
        "annotations_trainval2014.zip": coco_annotations(2014),
        **coco2014,
    }


def kaggle_30k() -> bytes:
    """Kaggle's captions of Flickr30k, with the row that lacks its second bar."""
    rows = "".join(f"{name}| {i}| A dog , runs .\n" for name in NAMES for i in range(4))
    return f"image_name| comment_number| comment\n{rows}{NAMES[0]}| 4   A dog runs across the grass .\n".encode()


def serve(server: FileServer, files: dict[str, bytes], pattern: str = "*") -> None:
    """Serve files, and make the recipes in the working directory expect them and fetch them from the server."""
    server.files = files
    yaml = YAML()
    for path in Path("recipes").glob(f"{pattern}.yaml"):
        recipe = yaml.load(path)
        for name, file in recipe["files"].items():
            if "url" in file:
                file["url"] = f"{server.address}/{name}"
            for key, value in (
                ("size", len(files[name])),
                ("approximate_size", len(files[name])),
                ("md5", hashlib.md5(files[name]).hexdigest()),
                ("sha256", hashlib.sha256(files[name]).hexdigest()),
            ):
                if key in file:
                    file[key] = value
        yaml.dump(recipe, path)


def records(output: str) -> list[Record]:
    """Run the command that `gridcap download` printed, then `prepare`."""
    command = output.splitlines()[-1].partition("`")[2].rpartition("`")[0]
    _, _, preset, *assignments = shlex.split(command)
    use(find_preset(preset, ROOT / "presets"), assignments, Path("params.yaml"))
    return prepare(load(Path("params.yaml"), "dataset", DatasetParams))[0]


def all_files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_images"), [("flickr8k", 4), ("flickr30k", 4), ("coco2014", 4), ("coco2017", 8)])
def test_a_downloaded_dataset_can_be_prepared(server: FileServer, name: str, num_images: int) -> None:
    files = miniatures()
    serve(server, files)
    arguments = ["download", name, "--root", "my data", *(["--mirror", server.address] if name == "flickr30k" else [])]
    result = gridcap(*arguments)
    assert result.exit_code == 0, result.exception
    recipe = read_recipe(Path("recipes") / f"{name}.yaml")
    title, license, *_ = result.stdout.splitlines()
    assert recipe.title in title
    assert recipe.license in license
    prepared = records(result.stdout)
    assert len(prepared) == num_images
    assert {record.split for record in prepared} == {"train", "val", "test"}
    assert not [file for file in all_files(Path("my data")) if "__MACOSX" in file or file.endswith((".zip", ".gz"))]
    assert not [path for path in Path("my data").rglob(".*")]
    num_requests = len(server.requests)
    again = gridcap(*arguments)
    assert again.exit_code == 0
    assert again.stdout.count("already there") == len(recipe.files)
    assert len(server.requests) == num_requests


@pytest.mark.slow
def test_both_years_of_coco_share_a_folder(server: FileServer) -> None:
    serve(server, miniatures())
    for name in ("coco2017", "coco2014"):
        assert gridcap("download", name, "--root", "coco").exit_code == 0
    assert {file.partition("/")[0] for file in all_files(Path("coco"))} == {
        *("train2014", "val2014", "train2017", "val2017"),
        *("annotations", "dataset_coco.json"),
    }
    assert len(os.listdir("coco/annotations")) == 4


def test_karpathy_has_the_splits_only(server: FileServer) -> None:
    serve(server, miniatures())
    result = gridcap("download", "karpathy", "--root", "flickr8k")
    assert result.exit_code == 0
    assert "gridcap use" not in result.stdout
    assert all_files(Path("flickr8k")) == {f"dataset_{name}.json" for name in ("coco", "flickr8k", "flickr30k")}


def vizwiz_files() -> dict[str, bytes]:
    """VizWiz-Captions, in which one train image has only a precanned caption."""
    files = {}
    for split, accepted in (("train", [True, True, False]), ("val", [True] * 4)):
        names = [f"VizWiz_{split}_{index:08}.jpg" for index in range(len(accepted))]
        first = 0 if split == "train" else 100
        document = {
            "images": [{"id": first + index, "file_name": name} for index, name in enumerate(names)],
            "annotations": [
                {
                    "id": first + index,
                    "image_id": first + index,
                    "caption": "A can."
                    if is_accepted
                    else "Quality issues are too severe to recognize visual content.",
                    "is_precanned": not is_accepted,
                    "is_rejected": False,
                }
                for index, is_accepted in enumerate(accepted)
            ],
        }
        files |= photos(split, names) | {f"annotations/{split}.json": json.dumps(document).encode()}
    return files


TOKEN_30K = "".join(f"{name}#{i}\tA dog , runs .\n" for name in NAMES for i in range(5))
PLACED = {
    "flickr30k-kaggle": photos("flickr30k_images", NAMES) | {"results.csv": kaggle_30k()},
    "flickr30k-token": photos("flickr30k-images", NAMES) | {"results_20130124.token": TOKEN_30K.encode()},
    "vizwiz": vizwiz_files(),
}
"""Miniatures of datasets without a recipe, by preset."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "num_images", "skipped"),
    [
        ("flickr30k-kaggle", {"train": 2, "val": 1, "test": 1}, {"malformed_rows": 1}),
        ("flickr30k-token", {"train": 2, "val": 1, "test": 1}, {}),
        (
            "vizwiz",
            {"train": 2, "val": 2, "test": 2},
            {"precanned_captions": 1, "images_without_accepted_captions": 1},
        ),
    ],
)
def test_datasets_without_a_recipe_have_presets(
    tmp_path: Path, preset: str, num_images: dict[str, int], skipped: dict[str, int]
) -> None:
    root = tmp_path / "data"
    for name, content in PLACED[preset].items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    params = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
    quarters = ["dataset.splits.val=0.25", "dataset.splits.test=0.25"] if preset.startswith("flickr30k") else []
    use(find_preset(preset, ROOT / "presets"), [f"dataset.root={root}", *quarters], params)
    counts = prepare(load(params, "dataset", DatasetParams))[1]
    assert counts.num_images == num_images
    assert {name: count for name, count in counts.num_skipped.items() if count} == skipped


KAGGLE_30K = """
title: Flickr30k from Kaggle
license: research
page: http://lab.example/flickr30k
root: data/flickr30k
preset: flickr30k-kaggle
settings: [dataset.splits.val=0.25, dataset.splits.test=0.25]
files:
  archive.zip: {unpack: [flickr30k_images, results.csv]}
"""
KAGGLE_8K = """
title: Flickr8k from Kaggle
license: research
page: http://lab.example/flickr8k
root: data/flickr8k
preset: flickr8k
settings: ['dataset.splits={by: seed, seed: 1, val: 0.25, test: 0.25}']
files:
  archive.zip: {unpack: [Images, captions.txt]}
"""


@pytest.mark.slow
def test_a_lab_adds_a_recipe_of_its_own(server: FileServer) -> None:
    server.files["archive.zip"] = zipped(photos("flickr30k_images", NAMES) | {"results.csv": kaggle_30k()})
    Path("recipes/kaggle30k.yaml").write_text(KAGGLE_30K)
    result = gridcap("download", "kaggle30k", "--mirror", f"{server.address}/")
    assert result.exit_code == 0, result.exception
    assert "archive.zip: unknown size, cannot be verified (the recipe has no digest)" in result.stdout
    assert sorted(len(record.captions) for record in records(result.stdout)) == [4, 4, 4, 4]

    captions = "image,caption\n" + "".join(f"{name},A dog runs .\n" for name in NAMES)
    server.files["archive.zip"] = zipped(photos("Images", NAMES) | {"captions.txt": captions.encode()})
    Path("kaggle8k.yaml").write_text(KAGGLE_8K)
    result = gridcap("download", "kaggle8k.yaml", "--mirror", server.address, "--root", "8k")
    assert result.exit_code == 0, result.exception
    assert len(records(result.stdout)) == 4


@pytest.mark.slow
def test_only_some_files_are_downloaded_and_archives_are_kept(server: FileServer) -> None:
    files = miniatures()
    serve(server, files)
    result = gridcap("download", "coco2017", "--root", "coco", "--only", "val2017.zip", "--archives", "kept")
    assert result.exit_code == 0, result.exception
    assert os.listdir("coco") == ["val2017"]
    assert Path("kept/val2017.zip").read_bytes() == files["val2017.zip"]
    shutil.rmtree("coco")
    server.files = {}
    assert (
        gridcap("download", "coco2017", "--root", "coco", "--only", "val2017.zip", "--archives", "kept").exit_code == 0
    )
    assert len(os.listdir("coco/val2017")) == 4
    unknown = gridcap("download", "coco2017", "--only", "test2017.zip")
    assert "--only test2017.zip: the recipe has no such file. Use train2017.zip" in str(unknown.exception)


@pytest.mark.slow
def test_a_file_that_must_be_requested_is_read_from_the_folder_of_archives(server: FileServer) -> None:
    files = miniatures()
    serve(server, files)
    arguments = ["download", "flickr30k", "--root", "30k", "--archives", "archives"]
    missing = gridcap(*arguments)
    assert isinstance(missing.exception, UserError)
    for fact in ("flickr30k-images.tar.gz", "shannon.cs.illinois.edu", "--archives"):
        assert fact in str(missing.exception)
    assert not Path("30k").exists()
    Path("archives").mkdir()
    archive = Path("archives/flickr30k-images.tar.gz")
    archive.write_bytes(files[archive.name][:-1])
    damaged = gridcap(*arguments)
    assert "has other bytes than the recipe says" in str(damaged.exception)
    archive.write_bytes(files[archive.name])
    assert gridcap(*arguments).exit_code == 0
    assert archive.is_file()


def test_nothing_is_unpacked_from_an_archive_with_another_digest(server: FileServer) -> None:
    serve(server, miniatures())
    server.files["Flickr8k_Dataset.zip"] = zipped(photos("Flicker8k_Dataset", NAMES[:3]))
    result = gridcap("download", "flickr8k", "--root", "8k")
    assert isinstance(result.exception, UserError)
    assert "other bytes than expected" in str(result.exception)
    assert os.listdir("8k") == []


def test_too_little_space_is_noticed_before_the_first_byte(server: FileServer) -> None:
    serve(server, miniatures())
    path = Path("recipes/flickr8k.yaml")
    path.write_text(path.read_text().replace("approximate_size: ", "approximate_size: 10000000000000"))
    result = gridcap("download", "flickr8k", "--root", "8k")
    assert isinstance(result.exception, UserError)
    assert "bytes are needed for archives and their files" in str(result.exception)
    assert server.requests == []


@pytest.mark.slow
def test_an_interrupt_at_any_time_leaves_nothing_half_made(server: FileServer) -> None:
    files = miniatures()
    files["Flickr8k_Dataset.zip"] = zipped(
        {f"Flicker8k_Dataset/{index}_1.jpg": os.urandom(20_000) for index in range(1000)}
    )
    serve(server, files)
    program = "from pipeline.console import main; main()"
    command = [sys.executable, "-c", program, "download", "flickr8k", "--root", "8k"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    statuses = set()
    for delay in (0.0, 0.01, 0.03, 0.06, 0.1, 0.2):
        num_requests = len(server.requests)
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while len(server.requests) == num_requests and process.poll() is None:
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert b"Traceback" not in stderr
        statuses.add(process.returncode)
        images = Path("8k/Flicker8k_Dataset")
        assert not images.exists() or len(os.listdir(images)) == 1000
    assert statuses <= {0, 130}
    assert 130 in statuses
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    assert len(all_files(Path("8k"))) == 1004


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "fault"),
    [(True, "400,260 bytes are needed, but 262,144 are free"), (False, "cannot be written (No space left on device)")],
)
def test_a_full_disk_is_one_sentence(server: FileServer, tmp_path: Path, lengths: bool, fault: str) -> None:
    server.lengths = lengths
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        files = miniatures()
        files["Flickr8k_Dataset.zip"] = zipped({"Flicker8k_Dataset/1_1.jpg": os.urandom(400_000)})
        serve(server, files)
        recipe = Path("recipes/flickr8k.yaml")
        recipe.write_text(recipe.read_text().replace("approximate_size", "# approximate_size"))
        program = "from pipeline.console import main; main()"
        command = [sys.executable, "-c", program, "download", "flickr8k", "--root", str(disk / "8k")]
        process = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
        )
        assert process.returncode == 2
        [line] = process.stderr.splitlines()
        assert fault in line
        assert line.endswith("Free disk space, then run again.")
        assert [path.name for path in (disk / "8k").rglob("*") if not path.name.startswith(".")] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(find_recipe(name, ROOT / "recipes"))
    assert all(file.digest and file.known_size for file in recipe.files.values())
    if recipe.preset:
        params = Path(shutil.copy(ROOT / "params.yaml", tmp_path))
        use(find_preset(recipe.preset, ROOT / "presets"), [f"dataset.root={recipe.root}", *recipe.settings], params)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"files": {"../a.zip": {}}}, "must be a file name"),
        ({"files": {".a": {}}}, "must be a file name"),
        ({"files": {"a.zip": {"unpack": ["../b"]}}}, "must be a path inside the folder"),
        ({"files": {"a.zip": {"unpack": ["/b"]}}}, "must be a path inside the folder"),
        ({"files": {"a.zip": {"md5": "0"}}}, "md5"),
        ({"files": {"a.zip": {"size": 0}}}, "size"),
        ({"files": {"a.zip": {"bytes": 1}}}, "not a valid key"),
        ({"license": None}, "license"),
    ],
)
def test_an_invalid_recipe_is_an_error(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    recipe = {"title": "A", "license": "B", "page": "C", "root": "D", "files": {}} | change
    path = tmp_path / "recipe.yaml"
    YAML().dump(recipe, path)
    with pytest.raises(UserError, match=f"recipe.yaml: .*{fault}"):
        read_recipe(path)


def test_an_unknown_recipe_lists_the_recipes() -> None:
    with pytest.raises(UserError, match=rf"no such recipe\. Use one of {', '.join(RECIPES)}, a YAML file, or weights:"):
        find_recipe("imagenet", ROOT / "recipes")
