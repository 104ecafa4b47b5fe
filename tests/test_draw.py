import json
from pathlib import Path

import pytest
from PIL import Image

from pipeline.captions.records import Record
from pipeline.evaluation.evaluate import EvaluateParams, ReportParams
from pipeline.report.draw import draw
from tests.evaluation_data import make_data

pytestmark = pytest.mark.slow


def evaluate_params(attention_plots: int, seed: int = 1) -> EvaluateParams:
    return EvaluateParams(
        tokenizer="spacy",
        meteor=False,
        spice=False,
        human_meteor=False,
        bootstrap_samples=100,
        attention_plots=attention_plots,
        report=ReportParams(best=1, worst=1, random=1),
        published=(),
        seed=seed,
    )


def drawn_files(folder: Path, params: EvaluateParams) -> list[str]:
    """Run `draw` on three images and return the paths of its files."""
    records = [
        Record(image_id=image_id, file=f"{image_id}.png", split="test", captions=("A.",)) for image_id in (5, 6, 7)
    ]
    for record in records:
        Image.new("RGB", (40, 30), "red").save(folder / record.file)
    draw(make_data(folder, folder, records, "a"), params, folder / "plots")
    return sorted(path.relative_to(folder / "plots").as_posix() for path in (folder / "plots").rglob("*.*"))


def test_curves_and_the_attention_of_random_images_are_drawn(tmp_path: Path) -> None:
    files = drawn_files(tmp_path, evaluate_params(attention_plots=2))
    attention = [file for file in files if file.startswith("attention/")]
    assert len(attention) == 2
    assert set(attention) < {"attention/5.png", "attention/6.png", "attention/7.png"}
    assert [file for file in files if file not in attention] == ["cider.png", "loss.png", "training.json"]
    assert [row["epoch"] for row in json.loads((tmp_path / "plots/training.json").read_text())] == [1, 2]


def test_zero_attention_plots_disable_them(tmp_path: Path) -> None:
    assert drawn_files(tmp_path, evaluate_params(attention_plots=0)) == ["cider.png", "loss.png", "training.json"]


def test_more_attention_plots_than_images_draw_all(tmp_path: Path) -> None:
    files = drawn_files(tmp_path, evaluate_params(attention_plots=9))
    assert len([file for file in files if file.startswith("attention/")]) == 3
