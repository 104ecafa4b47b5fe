"""Model folders: round trips, and errors about files that are missing, damaged or from another model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.captions.vocabulary import SPECIALS, VOCABULARY_FILE, Vocabulary
from pipeline.decoder.decoder import Decoder, DecoderKind
from pipeline.decoder.model_io import (
    CONFIG_FILE,
    HISTORY_FILE,
    REFINE_HISTORY_FILE,
    WEIGHTS_FILE,
    Refinement,
    model_files,
    read_history,
    read_model,
    read_refine_history,
    record_provenance,
    write_history,
    write_model,
    write_refine_history,
)
from pipeline.decoder.registry import build_decoder
from pipeline.errors import UserError
from tests.documents import edit
from tests.factories import decoder_params, small_spec
from tests.kinds import all_kinds
from tests.model_folders import model_config

VOCABULARY = Vocabulary((*SPECIALS, "red", "square"))
PARAMS = decoder_params(embedding_size=7, attention_size=5)
SPEC = small_spec(channels=6)
CONFIG = model_config(
    decoder=PARAMS, vocabulary_digest=VOCABULARY.digest, encoder=SPEC, versions={"torch": torch.__version__}
)
HISTORY = [
    {"epoch": 1, "train_loss": 2.0, "val_loss": 2.5, "val_accuracy": 0.25, "val_bleu4": 0.0, "val_cider": 0.5},
    {"epoch": 2, "train_loss": 1.5, "val_loss": 2.0, "val_accuracy": 0.5, "val_bleu4": 0.5, "val_cider": 0.75},
]


def make_decoder() -> Decoder:
    torch.manual_seed(0)
    return build_decoder(PARAMS, SPEC.grid, SPEC.channels, len(VOCABULARY))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_model(folder, make_decoder().state_dict(), VOCABULARY, CONFIG)
    write_history(folder, HISTORY)
    return folder


def test_a_model_is_read_as_written(folder: Path) -> None:
    model = read_model(folder)
    assert model.config == CONFIG
    assert model.vocabulary == VOCABULARY
    assert not model.decoder.training
    expected = make_decoder().state_dict()
    weights = model.decoder.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@all_kinds
def test_reading_a_model_of_any_kind_draws_no_random_numbers(kind: DecoderKind, tmp_path: Path) -> None:
    params = replace(PARAMS, kind=kind, non_local_size=3)
    decoder = build_decoder(params, SPEC.grid, SPEC.channels, len(VOCABULARY))
    write_model(tmp_path, decoder.state_dict(), VOCABULARY, replace(CONFIG, decoder=params))
    before = torch.random.get_rng_state()
    weights = read_model(tmp_path).decoder.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in decoder.state_dict().items())


def test_equal_models_have_equal_bytes(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_model(other, make_decoder().state_dict(), VOCABULARY, CONFIG)
    for name in (WEIGHTS_FILE, CONFIG_FILE, VOCABULARY_FILE):
        assert (other / name).read_bytes() == (folder / name).read_bytes()


def test_history_is_read_as_written(folder: Path) -> None:
    history = read_history(folder, CONFIG)
    assert history == HISTORY
    assert [type(history[0][key]) for key in ("epoch", "train_loss")] == [int, float]


def test_provenance_is_recorded_in_the_config_alone(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = record_provenance(folder, "data/flickr8k", "encoder.pth")
    assert config == replace(CONFIG, dataset="data/flickr8k", encoder_weights="encoder.pth")
    assert read_model(folder).config == config
    changed = {path.name for path in folder.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {CONFIG_FILE}


@pytest.mark.parametrize(
    ("file", "old", "new", "named_file", "facts"),
    [
        (CONFIG_FILE, '"channels": 6', '"channels": 7', WEIGHTS_FILE, ["size mismatch for key_proj.weight"]),
        (CONFIG_FILE, '"soft_attention"', '"hard"', CONFIG_FILE, ["decoder.kind", "'top_down' or 'adaptive'"]),
        (CONFIG_FILE, '"soft_attention"', '"adaptive"', WEIGHTS_FILE, [CONFIG_FILE, "AdaptiveDecoder"]),
        (CONFIG_FILE, '"hidden_size": 12', '"hidden_size": "x"', CONFIG_FILE, ["decoder.hidden_size", "integer"]),
        (CONFIG_FILE, '"hidden_size": 12', '"hidden_size": 10000000000', CONFIG_FILE, ["decoder.hidden_size", "8192"]),
        (CONFIG_FILE, '"hidden_size": 12', '"hidden_size": 8000', WEIGHTS_FILE, [CONFIG_FILE, "8000"]),
        (CONFIG_FILE, '"resnet18"', '"fasterrcnn_resnet50_fpn"', CONFIG_FILE, ["encoder.architecture", "resnet50"]),
        (CONFIG_FILE, '"layer3"', '"fc"', CONFIG_FILE, ["encoder.layer", "layer4"]),
        (CONFIG_FILE, '"precision": "float32"', '"precision": "int4"', CONFIG_FILE, ["encoder.precision", "int8"]),
        (CONFIG_FILE, '"image_height": 32', '"image_height": 160000', CONFIG_FILE, ["encoder.image_height", "2048"]),
        (CONFIG_FILE, '"grid_height": 2', '"grid_height": 100000', CONFIG_FILE, ["encoder.grid_height", "256"]),
        (CONFIG_FILE, '"grid_width": 2', '"grid_width": 0', CONFIG_FILE, ["encoder.grid_width", "1"]),
        (CONFIG_FILE, '"channels": 6', '"channels": 1000000', CONFIG_FILE, ["encoder.channels", "3072"]),
        (CONFIG_FILE, '"epoch": 1,', "", CONFIG_FILE, ["epoch", "required"]),
        (CONFIG_FILE, '"schema_version": 9', '"schema_version": 8', CONFIG_FILE, ["gridcap.model version 8"]),
        (CONFIG_FILE, '"gridcap.model"', '"gridcap.tokens"', CONFIG_FILE, ["gridcap.tokens"]),
        (CONFIG_FILE, '"weights_digest": "', '"weights_digest": "f', CONFIG_FILE, ["weights_digest", "[0-9a-f]{64}"]),
        (CONFIG_FILE, '"num_images": 1', '"num_images": 1' + "0" * 400, CONFIG_FILE, ["data.num_images"]),
        (CONFIG_FILE, '"epoch": 1', '"epoch": 0', CONFIG_FILE, ["epoch"]),
        (CONFIG_FILE, '"view": "whole"', '"view": "left"', CONFIG_FILE, ["view", "'whole'"]),
        (CONFIG_FILE, '"epoch": 1', '"epoch": 2, "epoch": 1', CONFIG_FILE, ['two values of the key "epoch"']),
        (CONFIG_FILE, '"vocabulary_digest": "', '"vocabulary_digest": "f', VOCABULARY_FILE, [VOCABULARY.digest]),
        (CONFIG_FILE, '"image_width": 32', '"image_width": 64', CONFIG_FILE, ["encoder", SPEC.fingerprint]),
        (VOCABULARY_FILE, '"red"', '"pink"', VOCABULARY_FILE, ["digest"]),
    ],
)
def test_inconsistent_files_are_errors_that_name_the_file(
    folder: Path, file: str, old: str, new: str, named_file: str, facts: list[str]
) -> None:
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    if file == CONFIG_FILE and "two values" not in facts[0]:
        edit(folder / file, {})
    with pytest.raises(UserError) as error:
        read_model(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / named_file}: ")
    assert all(fact in message for fact in facts), message
    assert "\n" not in message


def test_weights_of_another_digest_are_an_error(folder: Path) -> None:
    path = folder / CONFIG_FILE
    edit(path, {"weights_digest": "f" * 64})
    with pytest.raises(UserError, match=rf"{WEIGHTS_FILE}: SHA-256 differs .* {CONFIG_FILE}"):
        read_model(folder)


def test_weights_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    weights = make_decoder().state_dict()
    weights["output_proj.bias"][1] = float("nan")
    write_model(tmp_path, weights, VOCABULARY, CONFIG)
    with pytest.raises(UserError, match=rf"{WEIGHTS_FILE}: .*not finite"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("history", "fault"),
    [
        ([], "has 0 epochs, but the weights are from epoch 1"),
        (HISTORY[1:], "the epochs are not 1 to 1"),
        ([HISTORY[0], HISTORY[0]], "the epochs are not 1 to 2"),
        ([HISTORY[0] | {"val_cider": float("nan")}], r"\[0\]\.val_cider: .*finite"),
        ([HISTORY[0] | {"train_loss": 10**400}], r"\[0\]\.train_loss: .*finite"),
        ([HISTORY[0] | {"epoch": 1.5}], r"\[0\]\.epoch"),
        ([{"epoch": 1}], r"\[0\]\.val_loss"),
    ],
)
def test_a_history_out_of_bounds_is_an_error(folder: Path, history: list[dict[str, float]], fault: str) -> None:
    (folder / HISTORY_FILE).write_text(json.dumps(history))
    with pytest.raises(UserError, match=rf"{HISTORY_FILE}: {fault}.*Use a complete model folder"):
        read_history(folder, CONFIG)


REFINED = replace(CONFIG, refinement=Refinement(trained_fingerprint="0" * 16, epoch=1, selected_by="cider"))
METRICS = {name: value for name, value in HISTORY[0].items() if name not in ("epoch", "train_loss")}
REFINE_HISTORY = [{"epoch": 0, "train_reward": None, **METRICS}, {"epoch": 1, "train_reward": 0.5, **METRICS}]


def test_a_refined_model_is_read_as_written(tmp_path: Path) -> None:
    write_model(tmp_path, make_decoder().state_dict(), VOCABULARY, REFINED)
    write_history(tmp_path, HISTORY)
    write_refine_history(tmp_path, REFINE_HISTORY)
    assert {path.name for path in tmp_path.iterdir()} == set(model_files(REFINED))
    assert read_model(tmp_path).config == REFINED
    assert read_history(tmp_path, REFINED) == HISTORY
    assert read_refine_history(tmp_path, REFINED) == REFINE_HISTORY


def test_a_model_without_refinement_has_no_history_of_it(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == set(model_files(CONFIG))
    assert read_refine_history(folder, CONFIG) == []


@pytest.mark.parametrize(
    ("history", "fault"),
    [
        (REFINE_HISTORY[:1], "has 1 epochs, but the weights are from epoch 1"),
        (REFINE_HISTORY[1:], "the epochs are not 0 to 0"),
        ([REFINE_HISTORY[0] | {"train_reward": float("inf")}], r"\[0\]\.train_reward: .*finite"),
        ([REFINE_HISTORY[0] | {"val_bleu4": None}], r"\[0\]\.val_bleu4"),
    ],
)
def test_a_history_of_refinement_out_of_bounds_is_an_error(
    folder: Path, history: list[dict[str, float | None]], fault: str
) -> None:
    (folder / REFINE_HISTORY_FILE).write_text(json.dumps(history))
    with pytest.raises(UserError, match=rf"{REFINE_HISTORY_FILE}: {fault}.*Use a complete model folder"):
        read_refine_history(folder, REFINED)


@pytest.mark.parametrize("epoch", [-1, 1.5])
def test_a_refinement_of_a_negative_epoch_is_an_error(folder: Path, epoch: float) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["refinement"] = {"trained_fingerprint": "0", "epoch": epoch, "selected_by": "cider"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"{CONFIG_FILE}: refinement\.epoch"):
        read_model(folder)


def test_a_config_that_is_not_an_object_is_an_error(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("[]")
    with pytest.raises(UserError) as error:
        read_model(folder)
    assert str(error.value).startswith(f"{folder / CONFIG_FILE}: ")


@pytest.mark.parametrize("file", [WEIGHTS_FILE, CONFIG_FILE, VOCABULARY_FILE, HISTORY_FILE])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:20])])
def test_a_missing_or_truncated_file_is_an_error(folder: Path, file: str, damage: Callable[[Path], object]) -> None:
    damage(folder / file)
    with pytest.raises(UserError) as error:
        read_history(folder, CONFIG) if file == HISTORY_FILE else read_model(folder)
    assert str(error.value).startswith(f"{folder / file}: ")
