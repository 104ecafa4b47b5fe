import shutil
import threading
import time
from pathlib import Path

import pytest

from pipeline.app.runs import read_epochs, read_live, read_scores
from pipeline.artifacts import write_json
from pipeline.metrics.bootstrap import Resampling
from pipeline.metrics.caption_scores import compute_metrics, summarize_scores
from pipeline.metrics.tokenizers import build_corpora


def test_missing_files_give_no_metrics(tmp_path: Path) -> None:
    assert read_live(tmp_path) is None
    assert read_epochs(tmp_path / "training.json") == {}
    assert read_scores(tmp_path / "scores.json") == {}


def test_live_metrics_are_read_up_to_the_row_that_is_being_written(tmp_path: Path) -> None:
    folder = tmp_path / "plots" / "metrics"
    (folder / "train").mkdir(parents=True)
    (folder / "val_bleu4.tsv").mkdir()
    (folder / "train" / "loss.tsv").write_text("step\tloss\n10\t3.5\n20\t2.25\n3")
    (folder / "val_loss.tsv").write_text("step\tval_loss\n25\t2.5\n")
    (folder / "val_cider.tsv").write_text("")
    run = read_live(tmp_path)
    assert run is not None
    assert run.series == {"train/loss": [(10, 3.5), (20, 2.25)], "val_loss": [(25, 2.5)], "val_cider": []}
    assert run.step == 25
    assert run.modified == max(path.stat().st_mtime for path in folder.rglob("*.tsv"))


def test_live_metrics_are_read_while_a_new_run_replaces_them(tmp_path: Path) -> None:
    folder = tmp_path / "plots" / "metrics"

    def replace() -> None:
        for _ in range(100):
            (folder / "train").mkdir(parents=True)
            (folder / "train" / "loss.tsv").write_text("step\tloss\n10\t3.5\n")
            time.sleep(0.002)  # lets the reader find the file
            shutil.rmtree(tmp_path / "plots")

    writer = threading.Thread(target=replace)
    writer.start()
    num_found = 0
    while writer.is_alive():
        num_found += read_live(tmp_path) is not None
    assert num_found > 0


@pytest.mark.parametrize(
    "row", [b"\xff\xfe\t1", b"15\tnan", b"15\tinf", b"-1\t2", b"9" * 30 + b"\t1", b"9" * 5000 + b"\t1", b"15\t\0"]
)
def test_damaged_live_metrics_are_skipped(tmp_path: Path, row: bytes) -> None:
    folder = tmp_path / "plots" / "metrics"
    folder.mkdir(parents=True)
    (folder / "loss.tsv").write_bytes(b"step\tloss\n10\t3.5\n" + row + b"\n20\t2.25\n")
    run = read_live(tmp_path)
    assert run is not None
    assert run.series == {"loss": [(10, 3.5), (20, 2.25)]}


def test_epochs_without_a_value_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    path.write_text('[{"epoch": 1, "val_loss": 2.5, "val_cider": null}, {"epoch": 2, "val_loss": 2}]')
    assert read_epochs(path) == {"val_loss": [(1, 2.5), (2, 2)]}


@pytest.mark.parametrize(
    "content", ["", '[{"epoch": 1, "val_loss"', '{"epoch": 1}', '[{"epoch": "one"}]', '[{"epoch": 1, "val_loss": NaN}]']
)
def test_unreadable_epochs_are_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / "training.json").write_text(content)
    assert read_epochs(tmp_path / "training.json") == {}


@pytest.mark.parametrize(
    "content",
    [
        '{"BLEU-4": 0.5, "subsets": 3}',
        '{"BLEU-4": 0.5, "subsets": {"seen": 3, "held-out": {"BLEU-4": "high"}}}',
        '{"BLEU-4": 0.5, "ROUGE-L": NaN, "CIDEr-D": 1e999, "CIDEr": [1], "BLEU-1": 1' + "0" * 400 + "}",
    ],
)
def test_damaged_scores_are_skipped(tmp_path: Path, content: str) -> None:
    (tmp_path / "scores.json").write_text(content)
    assert read_scores(tmp_path / "scores.json") == {"all": {"BLEU-4": 0.5}}


@pytest.mark.slow
def test_scores_are_read_by_subset(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    (corpus,) = build_corpora(
        "spacy", "en", {1: ["a red cube"], 2: ["a blue cube"]}, [{1: "a red cube", 2: "a red cube"}]
    )
    metrics = compute_metrics(corpus, with_meteor=False, with_spice=False)
    write_json(path, summarize_scores(metrics, {"seen": [1]}, Resampling(bootstrap_samples=100, seed=0)))
    scores = read_scores(path)
    assert list(scores) == ["all", "seen"]
    assert list(scores["all"]) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D", "CIDEr"]
    assert scores["all"]["ROUGE-L"] == pytest.approx(5 / 6, abs=1e-6)
    assert scores["seen"]["ROUGE-L"] == 1
    path.write_text('{"num_images": 3, "BLEU-4"')
    assert read_scores(path) == {}
