"""Batches: every order is a permutation, and resuming skips no image."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.captions.tokens import TOKENS_FILE, CaptionTokens, read_tokens
from pipeline.captions.vocabulary import PAD
from pipeline.features.store import FeatureStore
from pipeline.training.batches import Batch, CaptionBatches
from tests.feature_stores import write_store
from tests.tiny_dataset import CHANNELS, NUM_REGIONS, NUM_TRAIN, SPEC


@pytest.fixture(scope="module")
def captions(data: Path) -> CaptionTokens:
    return read_tokens(data / "tokens" / TOKENS_FILE, "train")


@pytest.fixture(scope="module")
def store(data: Path) -> FeatureStore:
    return FeatureStore(data / "features")


def ids(batches: Iterable[Batch]) -> list[tuple[int, ...]]:
    return [batch.image_ids for batch in batches]


@given(batch_size=st.integers(1, 30), seed=st.integers(0, 9), epoch=st.integers(0, 9), start_batch=st.integers(0, 30))
def test_an_epoch_has_every_image_once_and_resumes_at_any_batch(
    captions: CaptionTokens, store: FeatureStore, batch_size: int, seed: int, epoch: int, start_batch: int
) -> None:
    batches = CaptionBatches(captions, store, batch_size)
    order = ids(batches.shuffled(seed, epoch))
    assert len(order) == len(batches)
    assert sorted(image_id for batch in order for image_id in batch) == list(range(NUM_TRAIN))
    assert ids(batches.shuffled(seed, epoch, start_batch=start_batch)) == order[start_batch:]


def test_seed_and_epoch_determine_the_order(captions: CaptionTokens, store: FeatureStore) -> None:
    batches = CaptionBatches(captions, store, 5)
    assert ids(batches.shuffled(1, 0)) == ids(batches.shuffled(1, 0))
    assert len({tuple(ids(batches.shuffled(seed, epoch))) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_a_batch_has_the_captions_and_the_grid_of_each_image(captions: CaptionTokens, store: FeatureStore) -> None:
    for batch in CaptionBatches(captions, store, 5).shuffled(1, 0):
        assert np.array_equal(batch.grids.numpy(), store.grids(batch.image_ids))
        for image_id, tokens in zip(batch.image_ids, batch.tokens.numpy(), strict=True):
            expected = captions.padded(np.flatnonzero(captions.image_id == image_id))
            assert np.array_equal(tokens[: len(expected), : expected.shape[1]], expected)
            assert (tokens[: len(expected), expected.shape[1] :] == PAD).all()
            assert (tokens[len(expected) :] == PAD).all()
        assert (batch.tokens[:, :, -1] != PAD).any()  # no wider than the longest caption


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_processes_share_every_batch(captions: CaptionTokens, store: FeatureStore, world_size: int) -> None:
    """Batches have 5 or 4 images, so some of 7 processes get an image without captions."""
    batches = CaptionBatches(captions, store, 5)
    expected = ids(batches.shuffled(1, 0))
    shares = [list(batches.shuffled(1, 0, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for index, image_ids in enumerate(expected):
        parts = [share[index] for share in shares]
        with_captions = [image_id for part in parts if (part.tokens != PAD).any() for image_id in part.image_ids]
        assert sorted(with_captions) == sorted(image_ids)
        without_captions = [part for part in parts if (part.tokens == PAD).all()]
        assert len(without_captions) == max(0, world_size - len(image_ids))
        assert all(len(part.image_ids) == 1 for part in without_captions)
        assert [part.has_captions for part in parts] == [bool((part.tokens != PAD).any()) for part in parts]


def test_epochs_sample_views_and_validation_uses_the_first(tmp_path: Path) -> None:
    num_images, views = 40, ("whole", "whole_flipped", "center")
    grids = [
        np.full((NUM_REGIONS, CHANNELS), image_id + view / 4, np.float16)
        for image_id in range(num_images)
        for view in range(3)
    ]
    store = write_store(tmp_path, SPEC, range(num_images), np.stack(grids), views)
    captions = CaptionTokens(
        image_id=np.arange(num_images),
        ids=np.full(num_images * 3, 5, dtype=np.int32),
        offset=np.arange(num_images + 1) * 3,
        text="a dog\n" * num_images,
    )
    batches = CaptionBatches(captions, store, 7, random_views=True)

    def views_of(loaded: Iterable[Batch]) -> dict[int, float]:
        return {
            image_id: 4 * (float(grid[0, 0]) - image_id)
            for batch in loaded
            for image_id, grid in zip(batch.image_ids, batch.grids, strict=True)
        }

    assert set(views_of(batches.by_length()).values()) == {0}
    first, second = views_of(batches.shuffled(1, 0)), views_of(batches.shuffled(1, 1))
    assert set(first.values()) == set(second.values()) == {0, 1, 2}
    assert first != second
    assert views_of(batches.shuffled(1, 0)) == first
    resumed = views_of(batches.shuffled(1, 0, start_batch=3))
    assert 0 < len(resumed) < num_images
    assert resumed.items() <= first.items()


def test_batches_by_length_have_every_image_once_and_little_padding(store: FeatureStore) -> None:
    lengths = 2 + np.arange(NUM_TRAIN) * 7 % 5
    captions = CaptionTokens(
        image_id=np.arange(NUM_TRAIN),
        ids=np.full(lengths.sum(), 5, dtype=np.int32),
        offset=np.append(0, np.cumsum(lengths)),
        text="a dog\n" * NUM_TRAIN,
    )
    batches = list(CaptionBatches(captions, store, 5).by_length())
    assert sorted(image_id for batch in batches for image_id in batch.image_ids) == list(range(NUM_TRAIN))
    loaded = [length for batch in batches for length in (batch.tokens != PAD).sum(dim=2).flatten().tolist()]
    assert loaded == sorted(lengths.tolist())


def test_grids_are_float16_and_tokens_integers(captions: CaptionTokens, store: FeatureStore) -> None:
    batch = next(CaptionBatches(captions, store, 5).by_length())
    assert (batch.grids.dtype, batch.tokens.dtype) == (torch.float16, torch.int64)
    assert batch.grids.shape == (5, NUM_REGIONS, CHANNELS)
