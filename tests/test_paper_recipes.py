"""From `gridcap download` and a preset to a report with published scores, on miniatures of the real archives.

The trained model is then scored on a miniature of nocaps, which has no train images.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from pipeline.decoder.model_io import CONFIG_FILE
from tests.command_line import git, gridcap
from tests.dvc_repository import STAGES, Repository
from tests.file_server import file_server
from tests.image_files import encode_jpeg
from tests.paths import ROOT
from tests.solid_images import solid_image
from tests.test_recipes import flickr8k_archives, serve

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

COLORS = ("red", "blue", "white")
SPLITS = ("train",) * 6 + ("val",) * 3 + ("test",) * 3
SMALL = [
    "tokenize.min_count=1",
    "encode.architecture=resnet18",
    "encode.weights=data/weights/random.pth",
    "encode.image_size=64",
    *(f"train.decoder.{name}_size=16" for name in ("embedding", "hidden", "attention")),
    "train.max_epochs=2",
    "evaluate.bootstrap_samples=100",
    "evaluate.attention_plots=1",
    "evaluate.meteor=false",
]
"""Settings for a small encoder and decoder."""
DOMAINS = ("in-domain", "near-domain", "out-domain") * 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    """Return a repository in which the commands for a paper's table ran, as its working directory."""
    folder = tmp_path_factory.mktemp("paper")
    repository = Repository.copy_project(folder)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), folder / "data/weights/random.pth")
    images = {f"{index}_{index}.jpg": solid_jpeg(COLORS[index % 3]) for index in range(len(SPLITS))}
    captions = [f"The image {index} is {COLORS[index % 3]} ." for index in range(len(SPLITS))]
    with pytest.MonkeyPatch.context() as patch, file_server() as server:
        patch.chdir(folder)
        serve(server, flickr8k_archives(images, SPLITS, captions), "flickr8k")
        run("download", "flickr8k")
        run("use", "flickr8k-sat", *SMALL)
        repository.dvc("repro")
        repository.commit()
        yield repository


def solid_jpeg(color: str) -> bytes:
    return encode_jpeg(solid_image(color))


def run(*arguments: object) -> str:
    result = gridcap(*arguments)
    if result.exception is not None and result.exit_code != 0:
        raise result.exception
    return result.stdout


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_report_shows_the_scores_next_to_published_ones(trained: Repository) -> None:
    scores = read(trained.folder / "results/metrics/scores.json")
    assert [row["scores"]["BLEU-4"] for row in scores["published"]] == [0.195, 0.213, 0.242, 0.213]
    report = " ".join(re.sub(r"<[^>]*>", " ", (trained.folder / "results/report.html").read_text("utf-8")).split())
    table = report.partition("This run and published scores")[2].partition("Signatures of this run:")[0]
    low, high = scores["intervals"]["BLEU-1"]
    assert f"this run 3 test images {scores['BLEU-1']:.3f} {low:.3f} to {high:.3f}" in table
    paper = "Show, Attend and Tell, soft attention Flickr8k, official test split; VGG encoder, 14 x 14 regions"
    assert f"{paper} (Xu et al. 2015) 0.670 0.448 0.299 0.195 0.189 –" in table
    assert scores["signature"]["BLEU-4"][0] in report
    card = (trained.folder / "results/model_card.md").read_text("utf-8")
    assert "| Show, Attend and Tell, hard attention | 0.670 | 0.457 | 0.314 | 0.213 | 0.203 |" in card
    assert read(trained.folder / "results/metrics/prepare.json")["num_images"] == {"train": 6, "val": 3, "test": 3}


@pytest.fixture(scope="module")
def nocaps(trained: Repository) -> Repository:
    folder = trained.folder / "data/nocaps"
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for image_id, domain in enumerate(DOMAINS):
        name = f"{image_id:016x}.jpg"
        (folder / "images" / name).write_bytes(solid_jpeg(COLORS[image_id % 3]))
        images.append({"id": image_id, "file_name": name, "open_images_id": name[:-4], "domain": domain})
        annotations += [
            {"id": 10 * image_id + i, "image_id": image_id, "caption": f"An image {image_id} that is {i}."}
            for i in range(10)
        ]
    document = {"images": images, "annotations": annotations, "info": {}, "licenses": []}
    (folder / "nocaps_val_4500_captions.json").write_text(json.dumps(document))
    return trained


def test_a_trained_model_is_scored_on_a_dataset_without_train_images(nocaps: Repository, tmp_path: Path) -> None:
    model = (nocaps.folder / "data/model" / CONFIG_FILE).read_bytes()
    run("export", "data/model", "--out", tmp_path / "model", "--with-encoder")

    run("use", "nocaps")
    output = nocaps.dvc("repro", "--single-item", "prepare", "encode", "generate")
    assert "no images in train and test (images: {'train': 0, 'val': 6, 'test': 0}" in output
    scores = json.loads(run("score", "data/generated", "data/prepared", "--json", "--no-meteor"))
    assert {name: subset["num_images"] for name, subset in scores["subsets"].items()} == dict.fromkeys(DOMAINS, 2)
    assert (nocaps.folder / "data/model" / CONFIG_FILE).read_bytes() == model

    predicted = tmp_path / "captions.jsonl"
    predicted.write_text(run("predict", "data/nocaps/images", "--model", tmp_path / "model", "--json"))
    annotations = "data/nocaps/nocaps_val_4500_captions.json"
    again = json.loads(run("score", predicted, annotations, "--json", "--no-meteor"))
    for key in ("BLEU-1", "CIDEr-D", "subsets"):
        assert again[key] == scores[key]
    table = run("score", predicted, annotations, "--no-meteor", "--bootstrap-samples", 100)
    assert re.search(r"\nout-domain, 2 images\nBLEU-4 +0\.\d{4}   0\.\d{4} to 0\.\d{4}\n", table)


def test_the_committed_dataset_and_model_come_back(nocaps: Repository) -> None:
    run("use", "nocaps")
    nocaps.dvc("repro", "--single-item", "prepare", "encode", "generate")
    assert "train" in nocaps.changed()
    git(nocaps.folder, "checkout", "params.yaml", "dvc.lock", "results/metrics")
    nocaps.dvc("checkout", "dvc.yaml")
    assert set(STAGES[1:]).isdisjoint(nocaps.changed())  # the first stage renders the scenes, which are not used here


def test_stages_that_need_train_images_say_so(nocaps: Repository) -> None:
    run("use", "nocaps")
    output = nocaps.dvc_fails("repro", "tokenize")
    assert "records.jsonl: no images in split train, whose captions give the vocabulary. " in output
    assert "section Score a model on another dataset of docs/datasets.md" in output
    assert "Traceback" not in output
    run("use", "nocaps", "generate.split=test")
    output = nocaps.dvc_fails("repro", "--single-item", "generate")
    assert "data/prepared: no images in split test, which generate.split names. " in output
