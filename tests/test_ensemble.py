"""Reading the models of an ensemble. `test_search.py` tests their captions."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.generation.ensemble import read_models
from tests.model_folders import SPEC, make_model


def test_members_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    model, ensemble = make_model(tmp_path / "model", seed=1), tmp_path / "ensemble"
    make_model(ensemble / "b", seed=3)
    make_model(ensemble / "a", seed=2)
    (ensemble / "README.md").write_text("Model folders for the ensemble.")
    assert [member.config.fingerprint for member in read_models(model, ensemble)] == ["run 1", "run 2", "run 3"]
    assert [member.config.fingerprint for member in read_models(model, None)] == ["run 1"]


def test_a_member_with_another_vocabulary_encoder_or_view_is_an_error(tmp_path: Path) -> None:
    model, ensemble = make_model(tmp_path / "model", seed=1), tmp_path / "ensemble"
    for name, folder in {
        "vocabulary": make_model(ensemble / "cats", seed=2, words="a cat runs fast"),
        "encoder": make_model(ensemble / "sharp", seed=2, spec=replace(SPEC, image_width=64)),
        "view top_left": make_model(ensemble / "corner", seed=2, view="top_left"),
    }.items():
        only = tmp_path / "only"
        shutil.copytree(folder, only / folder.name)
        with pytest.raises(UserError) as error:
            read_models(model, only)
        for fact in (str(only / folder.name), f"trained with {name}", str(model)):
            assert fact in str(error.value)
        shutil.rmtree(only)


def test_a_member_that_is_not_a_model_folder_is_an_error(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", seed=1)
    (tmp_path / "ensemble" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match=r"ensemble/empty/config\.json"):
        read_models(model, tmp_path / "ensemble")


def test_a_folder_that_contains_no_models_is_an_error(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", seed=1)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_models(model, tmp_path / "nowhere")
    with pytest.raises(UserError, match="model: is a model folder"):
        read_models(model, model)
