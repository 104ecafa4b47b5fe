"""Captions of stored images, by a trained model and by several."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.captions.vocabulary import SPECIALS, Vocabulary
from pipeline.decoder.model_io import ModelConfig, TrainingData, write_model
from pipeline.decoder.soft_attention import DecoderParams, SoftAttentionDecoder
from pipeline.errors import UserError
from pipeline.features.store import EncoderSpec, FeatureStore, write_index, write_shard
from pipeline.generation.ensemble import caption, read_models
from pipeline.generation.generate import generate
from pipeline.generation.search import SearchParams
from tests.factories import small_spec

SIZES = DecoderParams(
    embedding_size=8, hidden_size=8, attention_size=8, dropout=0.0, region_dropout=0.0, word_dropout=0.0
)
SETTING = small_spec(grid_width=3, channels=5)
IMAGE_IDS = tuple(range(10, 31))
SEARCH = replace(SearchParams.greedy(max_length=7), beam_size=3, n_best=2)
CPU = torch.device("cpu")


def make_model(
    folder: Path, seed: int, words: str = "a dog runs fast", spec: EncoderSpec = SETTING, view: str = "whole"
) -> Path:
    vocabulary = Vocabulary((*SPECIALS, *words.split()))
    torch.manual_seed(seed)
    decoder = SoftAttentionDecoder(SIZES, spec.grid, spec.channels, len(vocabulary))
    config = ModelConfig(
        fingerprint=f"run {seed}",
        decoder=SIZES,
        vocabulary_digest=vocabulary.digest,
        encoder=spec,
        encoder_fingerprint=spec.fingerprint,
        view=view,
        data=TrainingData(num_images=1, num_captions=5, num_val_images=1),
        epoch=1,
        selected_by="cider",
        versions={},
    )
    write_model(folder, decoder.state_dict(), vocabulary, config)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    contents = {image_id: f"{image_id:064x}" for image_id in IMAGE_IDS}
    grids = np.random.default_rng(0).standard_normal((len(IMAGE_IDS), 6, 5)).astype(np.float16)
    shard = write_shard(tmp_path / "features", SETTING, IMAGE_IDS, [(one, "whole") for one in contents.values()], grids)
    write_index(tmp_path / "features", SETTING, ("whole",), [shard], contents)
    return FeatureStore(tmp_path / "features")


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_image_is_captioned_in_order_whatever_the_batches(
    tmp_path: Path, store: FeatureStore, batch_size: int
) -> None:
    [model] = read_models(make_model(tmp_path / "model", seed=1), None)
    found = list(generate([model], store, IMAGE_IDS, SEARCH, batch_size, CPU))
    assert tuple(one.image_id for one in found) == IMAGE_IDS
    for one in found:
        grids = torch.from_numpy(store.grids([one.image_id]))
        [alone] = caption([model.decoder], grids, [one.image_id], SEARCH)
        assert [caption.words for caption in one.captions] == [tuple(model.vocabulary.decode(x.words)) for x in alone]
        assert one.log_probability == pytest.approx(alone[0].log_probability, abs=1e-5)
        assert one.attention.shape == (len(one.words), 6)


def test_images_are_read_as_captions_are_asked_for(tmp_path: Path, store: FeatureStore) -> None:
    [model] = read_models(make_model(tmp_path / "model", seed=1), None)
    captions = generate([model], store, [*IMAGE_IDS[:4], 99], SEARCH, 2, CPU)
    assert [next(captions).image_id for _ in range(4)] == list(IMAGE_IDS[:4])
    with pytest.raises(UserError, match="has no image 99"):
        next(captions)


def test_models_of_a_folder_vote_with_the_trained_one(tmp_path: Path, store: FeatureStore) -> None:
    model, others = make_model(tmp_path / "model", seed=1), tmp_path / "others"
    make_model(others / "b", seed=3)
    make_model(others / "a", seed=2)
    (others / "README.md").write_text("Models lie here.")
    models = read_models(model, others)
    assert [one.config.fingerprint for one in models] == ["run 1", "run 2", "run 3"]
    [alone] = read_models(model, None)
    together = list(generate(models, store, IMAGE_IDS, SEARCH, 8, CPU))
    single = list(generate([alone], store, IMAGE_IDS, SEARCH, 8, CPU))
    assert [one.words for one in together] != [one.words for one in single]


def test_models_that_cannot_vote_together_are_named(tmp_path: Path) -> None:
    model, others = make_model(tmp_path / "model", seed=1), tmp_path / "others"
    make_model(others / "cats", seed=2, words="a cat runs fast")
    with pytest.raises(UserError, match=r"others/cats: was trained with vocabulary \w+, but .*/model with \w+; models"):
        read_models(model, others)
    shutil.rmtree(others / "cats")
    make_model(others / "sharp", seed=2, spec=replace(SETTING, image_size=64))
    with pytest.raises(UserError, match="others/sharp: was trained with encoder setting"):
        read_models(model, others)
    shutil.rmtree(others / "sharp")
    make_model(others / "corner", seed=2, view="top_left")
    with pytest.raises(UserError, match=r"others/corner: was trained with view top_left, but .*/model with whole"):
        read_models(model, others)
    shutil.rmtree(others / "corner")
    (others / "empty").mkdir()
    with pytest.raises(UserError, match=r"others/empty/config.json: cannot be read"):
        read_models(model, others)


def test_a_folder_that_can_hold_no_models_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", seed=1)
    with pytest.raises(UserError, match="nowhere: is no folder; name one whose folders are models"):
        read_models(model, tmp_path / "nowhere")
    with pytest.raises(UserError, match="model: is itself a model; name the folder that it lies in"):
        read_models(model, model)


def test_features_of_another_view_than_the_model_learned_from_are_refused(tmp_path: Path, store: FeatureStore) -> None:
    [model] = read_models(make_model(tmp_path / "model", seed=1, view="center"), None)
    with pytest.raises(UserError, match="trained on the view 'center' of pictures, but the store's first is 'whole'"):
        next(generate([model], store, IMAGE_IDS, SEARCH, 8, CPU))


def test_bfloat16_is_a_setting_of_the_search(tmp_path: Path, store: FeatureStore) -> None:
    [model] = read_models(make_model(tmp_path / "model", seed=1), None)
    exact, rough = (
        [one.log_probability for one in generate([model], store, IMAGE_IDS, search, 8, CPU)]
        for search in (SEARCH, replace(SEARCH, precision="bfloat16"))
    )
    assert exact != rough
    assert exact == pytest.approx(rough, abs=0.2)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("[]", "config.json: is no model configuration"),
        ('"state": 10000000000', "decoder.safetensors: does not fit config.json beside it"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_a_sentence(tmp_path: Path, config: str, sentence: str) -> None:
    path = make_model(tmp_path / "model", seed=1) / "config.json"
    path.write_text(config if config == "[]" else path.read_text().replace('"state": 8', config))
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_models(tmp_path / "model", None)
