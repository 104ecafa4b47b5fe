"""The pipeline as users run it: `dvc repro` in a temporary repository, on a small embedded dataset."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import h5py
import pytest
from PIL import Image

from pipeline.captions.records import read_records
from pipeline.decoder.model_io import WEIGHTS_FILE, read_model, record_provenance
from pipeline.dvc_repair import repair
from pipeline.params import read_yaml
from pipeline.prediction.captioner import Captioner
from pipeline.presets import use
from tests.dvc_repository import STAGES, Repository
from tests.factories import decoder_params
from tests.model_folders import make_model

pytestmark = pytest.mark.slow


def test_every_stage_writes_its_outputs(repository: Repository) -> None:
    data = repository.folder / "data"
    captions = json.loads((data / "generated" / "captions.json").read_text())
    assert len(captions) == 9
    assert all(set(row) == {"image_id", "caption"} for row in captions)
    for path in [*data.glob("features/*.h5"), data / "tokens" / "tokens.h5", data / "generated" / "attention.h5"]:
        with h5py.File(path) as file:
            assert {"schema", "schema_version", "fingerprint"} <= set(file.attrs)
    scores = json.loads((repository.folder / "results/metrics/scores.json").read_text())
    assert 0 <= scores["BLEU-4"] <= 1
    assert scores["intervals"]["BLEU-4"][0] <= scores["BLEU-4"] <= scores["intervals"]["BLEU-4"][1]
    assert any("closest" in line for line in scores["protocol"]["BLEU-4"])
    assert scores["unavailable"]["METEOR"] == ["disabled"]
    assert sum(part["num_images"] for part in scores["subsets"].values()) == scores["num_images"] == 9
    metrics = json.loads((repository.folder / "results/metrics/captions.json").read_text())
    assert metrics["diversity"]["generated"]["num_captions"] == metrics["diversity"]["reference"]["num_captions"] == 9
    assert 0 <= metrics["word_usage"]["generated"]["precision"] <= 1
    assert metrics["human_agreement"]["num_images"] == 9
    rows = [json.loads(line) for line in (repository.folder / "results/metrics/images.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in captions[0]} for row in rows] == captions
    plots = repository.folder / "results/plots"
    assert {"training.json", "loss.png", "accuracy.png", "bleu4.png"} <= {path.name for path in plots.iterdir()}
    assert len(list((plots / "attention").glob("*.png"))) == 1
    report = (repository.folder / "results/report.html").read_text()
    assert report.count('<article class="card"') == 9
    assert "lr.peak" in report
    assert str(repository.folder) not in report


def test_predict_gives_the_captions_of_generate(repository: Repository) -> None:
    data = repository.folder / "data"
    records = read_records(data / "prepared", "test")
    images = data / "scenes" / "rendered" / "images"
    # The path of the encoder weights is relative to a folder above the model.
    captions = Captioner.load(data / "model", device="cpu").caption([images / record.file for record in records])
    generated = json.loads((data / "generated" / "captions.json").read_text())
    assert [caption.text for caption in captions] == [row["caption"] for row in generated]
    assert "data/scenes/rendered`: 24 images" in (repository.folder / "results" / "model_card.md").read_text()


def test_dvc_shows_metrics_and_plots(repository: Repository) -> None:
    shown = json.loads(repository.dvc("metrics", "show", "--json"))[""]["data"]
    scores = shown["results/metrics/scores.json"]["data"]
    assert scores["BLEU-4"] >= 0
    # Intervals, protocols and signatures are lists, which DVC does not show: they would not be readable as columns.
    assert not {"intervals", "protocol", "signature", "unavailable"} & {name for name, value in scores.items() if value}
    repository.dvc("plots", "show")
    page = (repository.folder / "dvc_plots" / "index.html").read_text()
    assert "val_bleu4" in page
    assert "gradient_norm" in page
    assert shown["results/live/metrics.json"]["data"]["train"]["loss"] > 0
    assert {"val_cider", "step"} <= set(repository.dvc("exp", "show", "--csv").partition("\n")[0].split(","))
    assert "<img" in page


def test_a_second_run_runs_nothing(repository: Repository) -> None:
    assert repository.repro() == []
    assert repository.changed() == []


@pytest.mark.parametrize(
    ("file", "section", "values", "stages"),
    [
        ("data/scenes/params.yaml", "render", {"seed": 5}, ["data/scenes/dvc.yaml:render"]),
        ("params.yaml", "dataset", {"missing_images": "skip"}, ["prepare", "evaluate"]),
        ("params.yaml", "tokenize", {"min_count": 3}, ["tokenize", "evaluate"]),
        ("params.yaml", "encode", {"precision": "bfloat16"}, ["encode", "evaluate"]),
        ("params.yaml", "train", {"seed": 2}, ["train", "evaluate"]),
        ("params.yaml", "refine", {"seed": 2}, ["refine", "evaluate"]),
        ("params.yaml", "generate", {"search": {}}, ["generate", "evaluate"]),
        ("params.yaml", "evaluate", {"seed": 2}, ["evaluate"]),
    ],
)
def test_a_param_reruns_the_stage_that_reads_it_and_the_report_that_shows_it(
    repository: Repository, file: str, section: str, values: dict[str, object], stages: list[str]
) -> None:
    before = (repository.folder / file).read_bytes()
    try:
        repository.edit(file, **{section: values})
        assert repository.changed() == sorted(stages)
    finally:
        (repository.folder / file).write_bytes(before)


@pytest.mark.parametrize(
    "module",
    [
        *(f"metrics/{name}" for name in ("rouge", "meteor", "bootstrap", "grounding", "token_accuracy")),
        "report/model_card",
        "report/figures",
        "evaluation/evaluate",
    ],
)
def test_a_change_in_the_code_of_metrics_or_report_reruns_only_evaluate(repository: Repository, module: str) -> None:
    path = repository.folder / "pipeline" / f"{module}.py"
    before = path.read_bytes()
    try:
        path.write_bytes(before + b"\n# changed\n")
        assert repository.changed() == ["evaluate"]
    finally:
        path.write_bytes(before)


def test_a_comment_in_the_trainer_retrains_nothing(repository: Repository) -> None:
    path = repository.folder / "pipeline/training/trainer.py"
    before, locks = path.read_bytes(), repository.locks()
    try:
        path.write_bytes(before + b"\n# changed\n")
        output = repository.dvc("repro", "train")
        assert "Running stage 'train'" in output
        assert "up to date" in output
    finally:
        path.write_bytes(before)
        repository.repro()
    assert repository.locks() == locks


def test_changed_search_settings_rerun_generate_and_evaluate_and_changing_back_runs_nothing(
    repository: Repository,
) -> None:
    before = (repository.folder / "params.yaml").read_bytes()
    locks = repository.locks()
    search = read_yaml(repository.folder / "params.yaml")["generate"]["search"]
    search |= {"beam_size": 1, "max_length": 10, "no_repeat_ngram_size": 0, "allow_unk": True}
    repository.edit("params.yaml", generate={"search": search})
    assert repository.repro() == ["generate", "evaluate"]
    (repository.folder / "params.yaml").write_bytes(before)
    output = repository.dvc("repro")
    assert "is cached - skipping run" in output
    assert repository.locks() == locks


def test_a_model_in_the_ensemble_folder_is_used(repository: Repository) -> None:
    data = repository.folder / "data"
    locks, captions = repository.locks(), (data / "generated" / "captions.json").read_text()
    twin = shutil.copytree(data / "model", data / "ensemble" / "twin")
    try:
        assert repository.changed() == ["generate"]
        assert "Running stage 'generate'" in repository.dvc("repro", "generate")
        assert (data / "generated" / "captions.json").read_text() == captions
        with h5py.File(data / "generated" / "attention.h5") as file:
            assert file.attrs["fingerprint"].count("+") == 1
    finally:
        shutil.rmtree(twin)
        repository.repro()
    assert repository.locks() == locks


def test_training_starts_from_a_model_folder_and_again_when_it_changes(repository: Repository) -> None:
    folder, locks = repository.folder, repository.locks()
    before = (folder / "params.yaml").read_bytes()
    start = shutil.copytree(folder / "data" / "model", folder / "models" / "first")
    config = read_model(start).config
    assert config.warm_start is None
    try:
        repository.edit("params.yaml", train={"start_from": "models/first"})
        output = repository.dvc("repro")
        assert f"train: initial weights of models/first, training run {config.fingerprint}: " in output
        assert " 0 new, 0 dropped, same encoder" in output
        assert repository.changed() == []
        warm_start = read_model(folder / "data" / "model").config.warm_start
        assert warm_start is not None
        assert warm_start.fingerprint == config.fingerprint
        assert f"of training run `{config.fingerprint}`" in (folder / "results" / "model_card.md").read_text()
        record_provenance(start, "elsewhere", None)
        assert repository.changed() == ["train"]
        shutil.rmtree(start)
        assert "models/first" in repository.dvc_fails("repro")
    finally:
        shutil.rmtree(folder / "models")
        (folder / "params.yaml").write_bytes(before)
        repository.repro()
    assert repository.locks() == locks


def test_a_run_killed_in_every_stage_gives_the_same_bytes(repository: Repository, tmp_path: Path) -> None:
    """Kill all processes, but in `train` only `dvc`, so that its child still runs when the next run starts."""
    killed = Repository.copy_project(tmp_path)
    killed_in = []
    for stage in STAGES:
        repair(killed.folder)
        with killed.start("repro") as process:
            assert process.stdout is not None
            # The stage may have finished while the previous one was being killed.
            if not any(f"Running stage '{stage}'" in line for line in process.stdout):
                continue
            time.sleep(0.3 if stage == "prepare" else 1.2)
            if stage == "train":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            killed_in.append(stage)
    assert {"encode", "train", "generate", "evaluate"} <= set(killed_in)
    repair(killed.folder)
    killed.repro()
    assert killed.locks() == repository.locks()


def test_truncated_lock_files_are_repaired_and_no_stage_runs_again(repository: Repository) -> None:
    locks = repository.locks()
    folder = repository.folder
    assert repair(folder) == []
    truncated = [folder / "dvc.lock", folder / "data/scenes/dvc.lock", folder / ".dvc/tmp/rwlock"]
    try:
        (folder / "dvc.lock").write_bytes(b"")
        (folder / "data/scenes/dvc.lock").write_text(locks["data/scenes/dvc.lock"].partition("cmd")[0])
        (folder / ".dvc/tmp/rwlock").write_text('{"read": {')
        assert "dvc.lock' validation failed" in repository.dvc_fails("repro")
        assert repair(folder) == truncated
        assert repository.repro() == []
        assert repository.locks() == locks
    finally:
        for name, text in locks.items():
            (folder / name).write_text(text)


def test_an_invalid_param_is_an_error_and_keeps_the_outputs(repository: Repository) -> None:
    before = (repository.folder / "params.yaml").read_bytes()
    repository.edit("params.yaml", train={"max_grad_norm": -1})
    try:
        output = repository.dvc_fails("repro")
    finally:
        (repository.folder / "params.yaml").write_bytes(before)
    assert "error: params.yaml: train.max_grad_norm must be greater than 0, got -1" in output
    assert "Traceback" not in output
    assert repository.repro() == []
    assert (repository.folder / "data" / "model" / "config.json").is_file()


ODD_NAME = "a\\b [c] {d} 'e' \"f\"; $g ${h} $(touch ran) `touch ran` #i *? & | < > %k ~ ! \u00fc \u65e5\u672c"
"""A file name with every character that means something to a shell, to YAML or to DVC's templates.

The backslash is at the start: ruamel.yaml adds a space if it breaks a line after one, so DVC would see a changed param.
"""
BAD_IDS = {"train": "00", "val": "08", "test": "11"}
"""Images of `odd_repository` that cannot be decoded."""


def write_linked_dataset(folder: Path) -> dict[str, Path]:
    """Write a dataset of 15 images, weights, a text, and folders of an ensemble and of initial weights.

    Each has an odd name and is a link that DVC follows.

    Returns:
        Files behind the links, by what they change.
    """
    disk = folder / "disk"
    (disk / "root").mkdir(parents=True)
    photos = disk / "root" / ODD_NAME
    photos.mkdir()
    (disk / "ensemble").mkdir()
    (disk / "ensemble" / "README.md").touch()
    sizes = decoder_params(embedding_size=16, hidden_size=16, attention_size=16)
    make_model(disk / "start", seed=1, words="a red thing", params=sizes)
    shutil.copy(folder / "data/scenes/encoder.safetensors", disk)
    rows, splits = ["image,caption"], {"train": range(8), "val": range(8, 11), "test": range(11, 15)}
    for index in range(15):
        name, color = f"{index:02}.png", ("red", "blue", "green")[index % 3]
        Image.new("RGB", (20 + index, 20), color).save(photos / name)
        rows += [f"{name},a {color} thing", f"{name},the thing is {color}"]
    for image in BAD_IDS.values():
        (photos / f"{image}.png").write_bytes(b"<html>")
    (photos / "01.png").rename(disk / "single.png")
    (photos / "01.png").symlink_to(disk / "single.png")
    (disk / "root" / "captions.txt").write_text("\n".join(rows))
    lists = {split: [f"{index:02}.png" for index in indices] for split, indices in splits.items()}
    (disk / "root" / "splits.json").write_text(json.dumps(lists))
    (folder / ODD_NAME).symlink_to(disk / "root")
    (folder / f"{ODD_NAME}.safetensors").symlink_to(disk / "encoder.safetensors")
    (folder / f"ensemble {ODD_NAME}").symlink_to(disk / "ensemble")
    (folder / f"start {ODD_NAME}").symlink_to(disk / "start")
    (disk / "text.csv").write_text("image,caption\n,a purple thing\n,a purple thing\n14.png,the purple test image\n")
    (folder / f"{ODD_NAME}.csv").symlink_to(disk / "text.csv")
    return {
        "caption file": disk / "root" / "captions.txt",
        "image": photos / "02.png",
        "linked image": disk / "single.png",
        "weights": disk / "encoder.safetensors",
        "ensemble": disk / "ensemble" / "README.md",
        "initial weights": disk / "start" / WEIGHTS_FILE,
        "text": disk / "text.csv",
    }


@pytest.fixture(scope="module")
def odd_repository(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, dict[str, Path]]:
    """A repository in which every stage has run on a dataset of odd names, with bad images and links."""
    repository = Repository.copy_project(tmp_path_factory.mktemp("odd"))
    linked = write_linked_dataset(repository.folder)
    values = {
        "dataset.format": "flickr8k",
        "dataset.root": ODD_NAME,
        "dataset.images": ODD_NAME,
        "dataset.captions": [{"file": "captions.txt", "folder": ".", "split": None}],
        "dataset.splits": {"by": "json", "file": "splits.json"},
        "dataset.bad_images": "skip",
        "tokenize.min_count": 1,
        "encode.weights": f"{ODD_NAME}.safetensors",
        "train.text": f"{ODD_NAME}.csv",
        "generate.ensemble": f"ensemble {ODD_NAME}",
        "train.start_from": f"start {ODD_NAME}",
        "train.start_from_grids": "adapt",
    }
    params = repository.folder / "params.yaml"
    use(params, [f"{key}={json.dumps(value)}" for key, value in values.items()], params)
    assert repository.repro() == STAGES[1:]
    return repository, linked


def test_odd_names_run_from_images_to_report(odd_repository: tuple[Repository, dict[str, Path]]) -> None:
    repository, _ = odd_repository
    folder = repository.folder
    assert list(folder.rglob("ran")) == []
    assert repository.repro() == []
    assert set(repository.changed()) & set(STAGES[1:]) == set()
    assert ODD_NAME in (folder / "results/model_card.md").read_text()


def test_bad_images_are_skipped_in_every_stage(odd_repository: tuple[Repository, dict[str, Path]]) -> None:
    folder = odd_repository[0].folder
    by_name = {record.file.removesuffix(".png"): record.image_id for record in read_records(folder / "data/prepared")}
    metrics = {path.stem: json.loads(path.read_text()) for path in (folder / "results/metrics").glob("*.json")}
    index = json.loads((folder / "data/features/index.json").read_text())
    captions = json.loads((folder / "data/generated/captions.json").read_text())
    assert metrics["prepare"]["num_images"] == {"train": 8, "val": 3, "test": 4}
    assert (metrics["encode"]["num_images"], metrics["encode"]["num_skipped_images"]) == (12, 3)
    assert index["skipped"] == sorted(by_name[name] for name in BAD_IDS.values())
    assert json.loads((folder / "data/model/config.json").read_text())["data"] == {
        "num_images": 7,
        "num_captions": 14,
        "num_val_images": 2,
        "num_text_captions": 2,
    }
    assert metrics["tokenize"]["text_num_held_out"] == 1
    assert {row["image_id"] for row in captions} == {by_name[name] for name in ("12", "13", "14")}
    assert (metrics["scores"]["num_images"], metrics["scores"]["num_skipped_images"]) == (3, 1)
    assert metrics["teacher_forcing"]["num_tokens"] == sum(
        len(caption.split()) + 1 for name in ("12", "13", "14") for caption in captions_of(folder, name)
    )
    page = " ".join((folder / "results/report.html").read_text().split())
    assert "captions for 3 test images. This page shows some of them. 1 more test images are left out" in page
    assert "On 3 images. 1 more are left out" in (folder / "results/model_card.md").read_text()


def captions_of(folder: Path, name: str) -> tuple[str, ...]:
    records = read_records(folder / "data/prepared")
    return next(record.captions for record in records if record.file == f"{name}.png")


@pytest.mark.parametrize(
    ("changed", "stages"),
    [
        ("caption file", ["prepare"]),
        ("image", ["prepare"]),
        ("linked image", ["prepare"]),
        ("weights", ["encode"]),
        ("ensemble", ["generate"]),
        ("initial weights", ["train"]),
        ("text", ["tokenize"]),
    ],
)
def test_a_change_behind_a_link_is_noticed(
    odd_repository: tuple[Repository, dict[str, Path]], changed: str, stages: list[str]
) -> None:
    repository, linked = odd_repository
    path = linked[changed]
    before = path.read_bytes()
    try:
        path.write_bytes(before + b"\n")
        assert [stage for stage in repository.changed() if stage in STAGES[1:]] == stages
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("linked", ["images", "ensemble"])
def test_a_linked_folder_that_dvc_does_not_watch_is_an_error(
    odd_repository: tuple[Repository, dict[str, Path]], linked: str
) -> None:
    repository, _ = odd_repository
    folder, disk = repository.folder, repository.folder / "disk"
    link = f"{ODD_NAME}/{ODD_NAME}/more" if linked == "images" else f"ensemble {ODD_NAME}/more"
    target = disk / f"{ODD_NAME} of {linked}"
    captions, splits = disk / "root" / "captions.txt", disk / "root" / "splits.json"
    before = {path: path.read_text() for path in (captions, splits)}
    try:
        if linked == "images":
            target.mkdir()
            shutil.copy(disk / "single.png", target)
            captions.write_text(before[captions] + "\nmore/single.png,a red thing")
            splits.write_text(before[splits].replace('["', '["more/single.png", "', 1))
        else:
            shutil.copytree(folder / "data" / "model", target)
        (folder / link).symlink_to(target)
        output = repository.dvc_fails("repro", "-f", "-s", "prepare" if linked == "images" else "generate")
        assert f"{link} -> {target}." in output
        assert "Traceback" not in output
    finally:
        (folder / link).unlink()
        for path, text in before.items():
            path.write_text(text)


def test_a_repaired_image_is_encoded(odd_repository: tuple[Repository, dict[str, Path]]) -> None:
    repository, _ = odd_repository
    path = repository.folder / ODD_NAME / ODD_NAME / f"{BAD_IDS['train']}.png"
    before = path.read_bytes()
    try:
        Image.new("RGB", (20, 20), "red").save(path)
        assert "1 encoded, 12 reused, 0 removed, 2 skipped, 0 failed" in repository.dvc("repro", "encode")
    finally:
        path.write_bytes(before)
