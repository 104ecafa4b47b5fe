"""The model card of a small config."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.decoder.model_io import ModelConfig, Refinement, TrainingData, WarmStart
from pipeline.report.model_card import write_model_card
from tests.factories import small_spec
from tests.model_folders import model_config

CONFIG = model_config(
    encoder=small_spec(),
    data=TrainingData(num_images=1200, num_captions=6000, num_val_images=30, num_text_captions=0),
    epoch=2,
    versions={"torch": "2.11.0"},
    dataset="data/flickr8k",
    encoder_weights="data/weights/resnet18.pth",
)
HISTORY: list[dict[str, float | None]] = [
    {"epoch": 1, "val_loss": 3.0, "val_accuracy": 0.25, "val_bleu4": 0.05, "val_cider": 0.25},
    {"epoch": 2, "val_loss": 2.5, "val_accuracy": 0.375, "val_bleu4": 0.125, "val_cider": 0.75},
    {"epoch": 3, "val_loss": 2.75, "val_accuracy": 0.5, "val_bleu4": 0.1, "val_cider": 0.5},
]
SCORES = {
    "num_images": 100,
    "BLEU-4": 0.1875,
    "CIDEr-D": 0.625,
    "intervals": {"BLEU-4": [0.15, 0.2], "CIDEr-D": [0.5, 0.75]},
    "protocol": {"BLEU-4": ["n: 4"], "CIDEr-D": ["n: 4"], "intervals": ["intervals: 95%"]},
    "signature": {"BLEU-4": ["BLEU-4|refs:5"], "CIDEr-D": ["CIDEr-D|refs:5"]},
    "unavailable": {"METEOR": ["disabled"]},
}


REFINE_HISTORY: list[dict[str, float | None]] = [
    {"epoch": 0, "val_loss": 2.5, "val_accuracy": 0.375, "val_bleu4": 0.125, "val_cider": 0.75},
    {"epoch": 1, "val_loss": 2.75, "val_accuracy": 0.25, "val_bleu4": 0.25, "val_cider": 0.875},
]


def card(
    folder: Path,
    config: ModelConfig = CONFIG,
    scores: dict[str, Any] | None = None,
    refine_history: list[dict[str, float | None]] | None = None,
) -> list[str]:
    write_model_card(folder / "model_card.md", config, HISTORY, refine_history or [], scores)
    return (folder / "model_card.md").read_text().splitlines()


def test_the_card_has_data_encoder_and_versions(tmp_path: Path) -> None:
    lines = card(tmp_path)
    assert lines[0] == "# Model card"
    assert "| training data | `data/flickr8k`: 1,200 images, 6,000 captions |" in lines
    assert f"| encoder weights | `data/weights/resnet18.pth`, SHA-256 `{'0' * 64}` |" in lines
    assert "| decoder | `soft_attention`: hidden size 8, embedding size 8, attention size 8 |" in lines
    assert "| versions | torch 2.11.0 |" in lines
    assert "## Licenses" in lines


def test_captions_without_images_are_counted(tmp_path: Path) -> None:
    data = replace(CONFIG.data, num_text_captions=39220)
    assert "| captions without images | 39,220 |" in card(tmp_path, replace(CONFIG, data=data))
    assert not any("without images" in line for line in card(tmp_path))


@pytest.mark.parametrize(("epoch", "cider"), [(0, "0.7500"), (1, "0.8750")])
def test_a_refined_model_has_the_scores_of_its_epoch_of_refinement(tmp_path: Path, epoch: int, cider: str) -> None:
    refinement = Refinement(trained_fingerprint="0123", epoch=epoch, selected_by="bleu4")
    lines = card(tmp_path, replace(CONFIG, refinement=refinement), refine_history=REFINE_HISTORY)
    assert "| checkpoint | epoch 2 of 3, selected by `cider` |" in lines
    expected = f"| self-critical training | of training run `0123`: epoch {epoch} of 1, selected by `bleu4` |"
    assert expected in lines
    assert f"| CIDEr-D | {cider} |" in lines
    assert not any("self-critical" in line for line in card(tmp_path))


def test_the_models_of_the_initial_weights_have_a_row_each(tmp_path: Path) -> None:
    first = WarmStart(
        fingerprint="01",
        dataset="data/coco",
        encoder_weights=None,
        num_kept_words=8000,
        num_new_words=100,
        num_dropped_words=20,
        new_input_projection=True,
        warm_start=None,
    )
    second = replace(first, fingerprint="23", dataset="data/flickr30k", new_input_projection=False, warm_start=first)
    lines = card(tmp_path, replace(CONFIG, warm_start=second))
    rows = [line for line in lines if line.startswith("| initial weights |")]
    counts = "8,000 words kept, 100 new, 20 dropped"
    assert rows == [
        f"| initial weights | of training run `23`: {counts}, same encoder; trained on `data/flickr30k` with encoder"
        " weights unknown |",
        f"| initial weights | of training run `01`: {counts}, new input projection for another encoder; trained on"
        " `data/coco` with encoder weights unknown |",
    ]
    assert not any("initial weights" in line for line in card(tmp_path))


def test_unrecorded_provenance_is_unknown(tmp_path: Path) -> None:
    lines = card(tmp_path, replace(CONFIG, dataset=None, encoder_weights=None))
    assert "| training data | unknown: 1,200 images, 6,000 captions |" in lines


def test_validation_scores_are_those_of_the_kept_epoch(tmp_path: Path) -> None:
    lines = card(tmp_path)
    assert "| checkpoint | epoch 2 of 3, selected by `cider` |" in lines
    assert "| BLEU-4 | 0.1250 |" in lines
    assert "| CIDEr-D | 0.7500 |" in lines
    assert any("optimistic" in line for line in lines)


def test_an_epoch_without_selection_has_no_warning(tmp_path: Path) -> None:
    lines = card(tmp_path, replace(CONFIG, epoch=3, selected_by="last"))
    assert "| checkpoint | epoch 3 of 3, the last one |" in lines
    assert not any("optimistic" in line for line in lines)


def test_evaluation_scores_have_intervals_and_signatures(tmp_path: Path) -> None:
    lines = card(tmp_path, scores=SCORES)
    assert "On 100 images." in lines
    assert "| BLEU-4 | 0.1875 | 0.1500 to 0.2000 |" in lines
    assert "| CIDEr-D | 0.6250 | 0.5000 to 0.7500 |" in lines
    start = lines.index("```text")
    assert lines[start : start + 4] == ["```text", "BLEU-4|refs:5", "CIDEr-D|refs:5", "```"]
    assert not any(line.startswith("| intervals") for line in lines)


def test_published_scores_are_listed(tmp_path: Path) -> None:
    row = {"system": "soft | attention", "source": "Xu et al. 2015", "data": "test split", "notes": None}
    lines = card(tmp_path, scores=SCORES | {"published": [row | {"scores": {"BLEU-4": 0.195, "METEOR": 0.189}}]})
    start = lines.index("| system | BLEU-4 | METEOR | data | notes | source |")
    assert lines[start + 2] == "| soft   attention | 0.195 | 0.189 | test split |  | Xu et al. 2015 |"
    assert not any("ublished" in line for line in card(tmp_path, scores=SCORES | {"published": []}))


def test_skipped_images_are_counted(tmp_path: Path) -> None:
    lines = card(tmp_path, scores=SCORES | {"num_skipped_images": 2})
    assert "On 100 images. 2 more are left out, since their files cannot be decoded." in lines


def test_scores_without_intervals_and_signatures_are_shown(tmp_path: Path) -> None:
    lines = card(tmp_path, scores={"protocol": {"BLEU-4": []}, "BLEU-4": 0.5})
    assert "| BLEU-4 | 0.5000 |  |" in lines


def test_a_card_says_what_is_not_defined(tmp_path: Path) -> None:
    scores = {**SCORES, "num_images": 1, "unavailable": {"CIDEr": ["not defined for one image"]}}
    history = [{**HISTORY[0], "val_cider": None}]
    config = replace(CONFIG, epoch=1, data=replace(CONFIG.data, num_val_images=1))
    write_model_card(tmp_path / "model_card.md", config, history, [], scores)
    lines = (tmp_path / "model_card.md").read_text().splitlines()
    assert "| CIDEr-D | not defined |" in lines
    assert "| CIDEr | not defined for one image | |" in lines
    assert "On 1 image." in lines


def test_a_card_without_scores_has_no_evaluation(tmp_path: Path) -> None:
    assert "## Evaluation scores" not in card(tmp_path)


@pytest.mark.parametrize("scores", [None, SCORES])
def test_the_same_model_gives_the_same_bytes(tmp_path: Path, scores: dict[str, Any] | None) -> None:
    assert card(tmp_path, scores=scores) == card(tmp_path, scores=scores)
