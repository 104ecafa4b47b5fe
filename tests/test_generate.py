"""Captions of stored features, by one model and by an ensemble."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.decoder.model_io import Refinement, TrainedModel
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.generation.ensemble import caption_grids, read_models, read_trained_models
from pipeline.generation.generate import generate
from pipeline.generation.search import SearchParams
from tests.feature_stores import write_store
from tests.model_folders import SPEC, make_model

IMAGE_IDS = tuple(range(10, 31))
SEARCH = replace(SearchParams.greedy(max_length=7), beam_size=3, n_best=2)
CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    grids = np.random.default_rng(0).standard_normal((len(IMAGE_IDS), 6, 5)).astype(np.float16)
    return write_store(tmp_path / "features", SPEC, IMAGE_IDS, grids)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_images_are_captioned_in_order_with_any_batch_size(
    tmp_path: Path, store: FeatureStore, batch_size: int
) -> None:
    [model] = read_models(make_model(tmp_path / "model", seed=1), None)
    generated = list(generate([model], store, IMAGE_IDS, SEARCH, batch_size, CPU))
    assert tuple(image.image_id for image in generated) == IMAGE_IDS
    for image in generated:
        grids = torch.from_numpy(store.grids([image.image_id]))
        [expected] = caption_grids([model.decoder], model.vocabulary.words, grids, [image.image_id], SEARCH)
        assert [caption.words for caption in image.captions] == [caption.words for caption in expected]
        assert image.best.log_probability == pytest.approx(expected[0].log_probability, abs=1e-5)
        assert image.attention.shape == (len(image.words), 2, 3)


def test_images_are_read_lazily(tmp_path: Path, store: FeatureStore) -> None:
    [model] = read_models(make_model(tmp_path / "model", seed=1), None)
    captions = generate([model], store, [*IMAGE_IDS[:4], 99], SEARCH, 2, CPU)
    assert [next(captions).image_id for _ in range(4)] == list(IMAGE_IDS[:4])
    with pytest.raises(UserError, match="99"):
        next(captions)


@pytest.mark.parametrize("search", [SEARCH, SearchParams.greedy(5), replace(SearchParams.greedy(5), method="sample")])
def test_a_grid_that_is_not_finite_is_an_error(tmp_path: Path, search: SearchParams) -> None:
    [model] = read_models(make_model(tmp_path / "model", seed=1), None)
    grids = np.ones((2, 6, 5), np.float16)
    grids[1, 3, 2] = np.nan
    store = write_store(tmp_path / "features", SPEC, [1, 2], grids)
    with pytest.raises(UserError, match=r"image 2: .*not finite\. Check the feature store"):
        list(generate([model], store, [1, 2], search, 8, CPU))


def test_an_ensemble_and_its_first_model_give_different_captions(tmp_path: Path, store: FeatureStore) -> None:
    model = make_model(tmp_path / "model", seed=1)
    make_model(tmp_path / "ensemble" / "other", seed=2)
    ensemble = list(generate(read_models(model, tmp_path / "ensemble"), store, IMAGE_IDS, SEARCH, 8, CPU))
    single = list(generate(read_models(model, None), store, IMAGE_IDS, SEARCH, 8, CPU))
    assert [image.words for image in ensemble] != [image.words for image in single]


def test_features_of_another_view_are_an_error(tmp_path: Path, store: FeatureStore) -> None:
    models = read_models(make_model(tmp_path / "model", seed=1, view="center"), None)
    with pytest.raises(UserError) as error:
        next(generate(models, store, IMAGE_IDS, SEARCH, 8, CPU))
    for fact in ("encode.views", "features is whole", "trained on center"):
        assert fact in str(error.value)


def test_bfloat16_rounds_log_probabilities(tmp_path: Path, store: FeatureStore) -> None:
    models = read_models(make_model(tmp_path / "model", seed=1), None)
    exact, rounded = (
        [image.best.log_probability for image in generate(models, store, IMAGE_IDS, search, 8, CPU)]
        for search in (SEARCH, replace(SEARCH, precision="bfloat16"))
    )
    assert exact != rounded
    assert exact == pytest.approx(rounded, abs=0.2)


def test_the_trained_model_replaces_its_refinement_in_the_ensemble(tmp_path: Path) -> None:
    trained = make_model(tmp_path / "trained", seed=1)
    make_model(tmp_path / "ensemble" / "other", seed=2)
    refined, other = read_models(make_model(tmp_path / "model", seed=3), tmp_path / "ensemble")
    assert read_trained_models(trained, [refined, other]) == []

    def refinement_of(fingerprint: str) -> TrainedModel:
        refinement = Refinement(trained_fingerprint=fingerprint, epoch=1, selected_by="cider")
        return replace(refined, config=replace(refined.config, refinement=refinement))

    models = read_trained_models(trained, [refinement_of("run 1"), other])
    assert [model.config.fingerprint for model in models] == ["run 1", "run 2"]
    with pytest.raises(UserError, match="trained: is from training run run 1, but the model is a refinement of run 9"):
        read_trained_models(trained, [refinement_of("run 9"), other])
