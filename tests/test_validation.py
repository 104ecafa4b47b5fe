"""Validation after an epoch, against pycocoevalcap."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from pipeline.captions.tokens import TOKENS_FILE, CaptionTokens, group_references, read_tokens
from pipeline.features.store import FeatureStore
from pipeline.training.batches import CaptionBatches
from pipeline.training.teacher_forcing import evaluate_split
from pipeline.training.trainer import Trainer
from pipeline.training.validation import NonFiniteLossError, ValidationResult, validate
from tests.factories import decoder_params, lr_params, train_params
from tests.tiny_dataset import NUM_VAL, make_trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def captions(data: Path) -> CaptionTokens:
    return read_tokens(data / "tokens" / TOKENS_FILE, "val")


@pytest.fixture(scope="module")
def trainer(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A trainer after a few epochs, so that captions differ and some match their references."""
    params = train_params(decoder=decoder_params(), max_epochs=20, lr=lr_params(peak=0.05, schedule="constant"))
    trainer = make_trainer(data, tmp_path_factory.mktemp("trainer"), params)
    for _ in range(8):
        assert list(trainer.train_epoch(lambda _: False))
        trainer.progress.batch = 0
        trainer.progress.epoch += 1
    return trainer


def run(trainer: Trainer, data: Path, captions: CaptionTokens, batch_size: int = 3) -> ValidationResult:
    batches = CaptionBatches(captions, FeatureStore(data / "features"), batch_size)
    return validate(trainer.decoder.eval(), batches, group_references(captions), trainer.vocabulary, 6)


def test_scores_equal_those_of_pycocoevalcap(trainer: Trainer, data: Path, captions: CaptionTokens) -> None:
    result = run(trainer, data, captions)
    generated = {image_id: [" ".join(words)] for image_id, words in result.captions.items()}
    expected = {
        image_id: [" ".join(words) for words in image_captions]
        for image_id, image_captions in group_references(captions).items()
    }
    assert len(generated) == NUM_VAL
    assert len({caption for (caption,) in generated.values()}) > 1
    assert result.bleu4 == pytest.approx(Bleu(4).compute_score(expected, generated, verbose=0)[0][3], abs=1e-9)
    assert result.cider == pytest.approx(Cider().compute_score(expected, generated)[0], abs=1e-9)
    assert min(result.bleu4, result.cider) > 0.1  # so that the comparison is not trivial


def test_loss_and_accuracy_are_those_of_teacher_forcing(trainer: Trainer, data: Path, captions: CaptionTokens) -> None:
    result = run(trainer, data, captions)
    batches = CaptionBatches(captions, FeatureStore(data / "features"), 8)
    expected = evaluate_split(trainer.decoder.eval(), batches)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.accuracy == expected.accuracy


def test_the_batch_size_has_no_effect(trainer: Trainer, data: Path, captions: CaptionTokens) -> None:
    assert run(trainer, data, captions, 1).metrics == pytest.approx(run(trainer, data, captions, 8).metrics, rel=1e-6)


def test_captions_are_truncated_at_the_maximum_length(trainer: Trainer, data: Path, captions: CaptionTokens) -> None:
    batches = CaptionBatches(captions, FeatureStore(data / "features"), 8)
    result = validate(trainer.decoder.eval(), batches, group_references(captions), trainer.vocabulary, 1)
    assert {len(words) for words in result.captions.values()} == {1}


def test_a_loss_that_is_not_finite_is_reported_before_captions(data: Path, captions: CaptionTokens) -> None:
    trainer = make_trainer(data, data, train_params())
    with torch.no_grad():
        for parameter in trainer.decoder.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match="nan"):
        run(trainer, data, captions)


def test_selection_scores() -> None:
    result = ValidationResult(loss=2.0, accuracy=0.5, bleu4=0.25, cider=1.5, captions={})
    assert result.selection_score("bleu4", epoch=7) == 0.25
    assert result.selection_score("cider", epoch=7) == 1.5
    assert result.selection_score("last", epoch=7) == 7


def test_metrics_have_the_names_of_the_history() -> None:
    result = ValidationResult(loss=2.0, accuracy=0.5, bleu4=0.25, cider=1.5, captions={})
    assert result.metrics == {"val_loss": 2.0, "val_accuracy": 0.5, "val_bleu4": 0.25, "val_cider": 1.5}
    assert replace(result, captions={1: ["a"]}).metrics == result.metrics


@pytest.mark.slow
def test_training_does_not_import_pycocoevalcap() -> None:
    script = "import sys, pipeline.training.trainer; print([m for m in sys.modules if m.startswith('pycocoeval')])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
