"""The pipeline as users run it: `dvc repro` in a temporary repository, on a small embedded dataset."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
from ruamel.yaml import YAML

from pipeline.captions.records import read_records
from pipeline.dvc_repair import repair
from pipeline.params import read_yaml
from pipeline.prediction.captioner import Captioner
from pipeline.presets import use
from tests.command_line import git
from tests.paths import ROOT

pytestmark = pytest.mark.slow

SOURCES = ["gridcap.py", "pipeline", "stages", "presets", "data/weights", "data/ensemble", "dvc.yaml", "params.yaml"]
SOURCES += [".dvcignore", ".dvc/config"]
SOURCES += [f"data/scenes/{name}" for name in ("dvc.yaml", "params.yaml", "encoder.json")]
SOURCES += ["data/scenes/encoder.safetensors"]
STAGES = ["data/scenes/dvc.yaml:render", "prepare", "tokenize", "encode", "train", "generate", "evaluate"]


class Repository:
    """A small copy of the project, with git and DVC set up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in SOURCES:
            source, target = ROOT / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        # params.yaml of the working tree may select another dataset.
        use(ROOT / "presets/scenes.yaml", [], folder / "params.yaml")
        self.edit("data/scenes/params.yaml", render={"num_train": 24, "num_val": 6, "num_test": 9})
        decoder = {"kind": "soft_attention", "embedding_size": 16, "hidden_size": 16, "attention_size": 16}
        decoder |= {"dropout": 0.1, "region_dropout": 0.0, "word_dropout": 0.1}
        self.edit(
            "params.yaml", train={"max_epochs": 3, "decoder": decoder}, evaluate={"meteor": False, "attention_plots": 1}
        )
        (folder / ".gitignore").write_text("/data/.work\n/results/live\n")
        git(folder, "init", "--quiet")
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "--message", "A small copy")

    def edit(self, file: str, **sections: dict[str, object]) -> None:
        yaml = YAML()
        document = yaml.load(self.folder / file)
        for section, values in sections.items():
            document[section].update(values)
        yaml.dump(document, self.folder / file)

    def start(self, *words: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.Popen(
            [sys.executable, "-m", "dvc", *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def dvc(self, *words: str) -> str:
        with self.start(*words) as process:
            output = process.communicate()[0]
        assert process.returncode == 0, output
        return output

    def dvc_fails(self, *words: str) -> str:
        with self.start(*words) as process:
            output = process.communicate()[0]
        assert process.returncode != 0, output
        return output

    def repro(self) -> list[str]:
        """Run `dvc repro` and return the stages that ran."""
        return re.findall(r"Running stage '([^']+)'", self.dvc("repro"))

    def changed(self) -> list[str]:
        """Return the stages whose dependencies have changed."""
        output = self.dvc("status", "--json")  # preceded by a warning about the frozen stage
        return sorted(json.loads(output[output.index("{") :]))

    def locks(self) -> dict[str, str]:
        return {name: (self.folder / name).read_text() for name in ("dvc.lock", "data/scenes/dvc.lock")}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository in which every stage has run once, uninterrupted."""
    repository = Repository(tmp_path_factory.mktemp("uninterrupted"))
    assert repository.repro() == STAGES
    return repository


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
    search |= {"beam_size": 1, "max_length": 10, "length_alpha": 0.5, "allow_unk": True}
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
        assert repository.repro()[0] == "generate"
        assert (data / "generated" / "captions.json").read_text() == captions
        with h5py.File(data / "generated" / "attention.h5") as file:
            assert file.attrs["fingerprint"].count("+") == 1
    finally:
        shutil.rmtree(twin)
        repository.repro()
    assert repository.locks() == locks


def test_a_run_killed_in_every_stage_gives_the_same_bytes(repository: Repository, tmp_path: Path) -> None:
    """Kill all processes, but in `train` only `dvc`, so that its child still runs when the next run starts."""
    killed = Repository(tmp_path)
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
