"""Evaluation under teacher forcing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.captions.tokens import TOKENS_FILE, read_tokens
from pipeline.features.store import FeatureStore
from pipeline.training.batches import CaptionBatches
from pipeline.training.teacher_forcing import TeacherForcedResult, evaluate_batch, evaluate_split, merge_results
from tests.factories import train_params
from tests.tiny_dataset import make_trainer

CPU = torch.device("cpu")


def result(loss: float, predicted: list[int], target: list[int]) -> TeacherForcedResult:
    return TeacherForcedResult(loss=loss, predicted=np.array(predicted), target=np.array(target))


def test_merged_loss_weights_batches_by_their_words() -> None:
    merged = merge_results([result(1.0, [4, 5, 6], [4, 5, 7]), result(5.0, [8], [8])])
    assert merged.loss == pytest.approx((3 * 1.0 + 1 * 5.0) / 4)
    assert merged.predicted.tolist() == [4, 5, 6, 8]
    assert merged.target.tolist() == [4, 5, 7, 8]
    assert merged.accuracy == 3 / 4


def test_batches_of_unequal_size_give_the_loss_of_one_batch(data: Path, tmp_path: Path) -> None:
    """24 images in batches of 7 leave a last batch of 3. The number of captions and their lengths differ."""
    decoder = make_trainer(data, tmp_path, train_params()).decoder.eval()
    captions, store = read_tokens(data / "tokens" / TOKENS_FILE, "train"), FeatureStore(data / "features")
    single_batch = evaluate_split(decoder, CaptionBatches(captions, store, 24))
    small_batches = evaluate_split(decoder, CaptionBatches(captions, store, 7))
    num_words = int((captions.length - 1).sum())
    assert len(single_batch.target) == len(small_batches.target) == num_words
    assert small_batches.loss == pytest.approx(single_batch.loss, rel=1e-6)
    batches = [evaluate_batch(decoder, batch).read() for batch in CaptionBatches(captions, store, 7).by_length()]
    assert np.mean([batch.loss for batch in batches]) != pytest.approx(single_batch.loss, rel=1e-6)


def test_dropout_must_be_off(data: Path, tmp_path: Path) -> None:
    decoder = make_trainer(data, tmp_path, train_params()).decoder.train()
    captions, store = read_tokens(data / "tokens" / TOKENS_FILE, "val"), FeatureStore(data / "features")
    with pytest.raises(AssertionError, match="dropout"):
        evaluate_split(decoder, CaptionBatches(captions, store, 7))
