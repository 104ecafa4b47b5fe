"""Location and verification of the weights of a model's encoder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.decoder.model_io import record_provenance
from pipeline.errors import UserError
from pipeline.features.store import EncoderSpec
from pipeline.prediction.captioner import Captioner
from tests.command_line import gridcap
from tests.documents import edit
from tests.solid_images import solid_image
from tests.tiny_captioner import Tiny, copy_model_without_encoder

pytestmark = pytest.mark.slow

TORCHVISION_FILE = "resnet18-f37072fd.pth"


@pytest.fixture
def moved(tiny: Tiny, tmp_path: Path) -> Path:
    return copy_model_without_encoder(tiny, tmp_path / "clone" / "data" / "model")


def other_weights(tiny: Tiny, path: Path) -> Path:
    weights = load_file(tiny.weights)
    weights["conv1.weight"] += 1
    save_file(weights, path)
    return path


def names_red(captioner: Captioner) -> bool:
    return "red" in captioner.caption([solid_image("red")])[0].words


def test_missing_weights_are_an_error_that_names_the_searched_paths(moved: Path) -> None:
    with pytest.raises(UserError) as error:
        Captioner.load(moved)
    for fact in (str(moved), "resnet18 up to layer2", "weights/encoder.safetensors", "--encoder-weights"):
        assert fact in str(error.value)
    assert "--download" not in str(error.value)


def test_weights_are_found_below_a_folder_above_the_model(moved: Path, tiny: Tiny) -> None:
    path = moved.parents[1] / "weights" / "encoder.safetensors"
    path.parent.mkdir()
    shutil.copy(tiny.weights, path)
    assert names_red(Captioner.load(moved))
    other_weights(tiny, path)
    with pytest.raises(UserError, match=r"encoder\.safetensors \(another digest\)"):
        Captioner.load(moved)


def test_torchvision_weights_are_found_in_the_cache_and_not_downloaded_by_default(
    moved: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    record_provenance(moved, "images", f"data/weights/{TORCHVISION_FILE}")
    with pytest.raises(UserError) as error:
        Captioner.load(moved)
    for fact in (f"checkpoints/{TORCHVISION_FILE}", "--download"):
        assert fact in str(error.value)
    checkpoints = tmp_path / "cache" / "hub" / "checkpoints"
    assert not checkpoints.exists()
    checkpoints.mkdir(parents=True)
    torch.save(load_file(tiny.weights), checkpoints / TORCHVISION_FILE)
    assert names_red(Captioner.load(moved))


def test_torchvision_weights_are_downloaded_if_allowed(
    moved: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_provenance(moved, "images", f"data/weights/{TORCHVISION_FILE}")
    urls = []

    def fetch(url: str) -> Path:
        urls.append(url)
        return tiny.weights

    monkeypatch.setattr("pipeline.features.pretrained.fetch", fetch)
    assert names_red(Captioner.load(moved, download=True))
    assert [url.rpartition("/")[2] for url in urls] == [TORCHVISION_FILE]


def test_named_weights_must_have_the_recorded_digest(moved: Path, tiny: Tiny, tmp_path: Path) -> None:
    other = other_weights(tiny, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: the weights have digest .*--encoder-weights"):
        Captioner.load(moved, encoder_weights=other)
    assert names_red(Captioner.load(moved, encoder_weights=tiny.weights))
    weights = load_file(other)
    del weights["conv1.weight"]
    save_file(weights, other)
    with pytest.raises(UserError, match=r"other\.safetensors: .*conv1\.weight"):
        Captioner.load(moved, encoder_weights=other)


def test_weights_in_the_model_folder_must_have_the_recorded_digest(moved: Path, tiny: Tiny) -> None:
    shutil.copy(tiny.weights, moved / "encoder.safetensors")
    assert names_red(Captioner.load(moved))
    other_weights(tiny, moved / "encoder.safetensors")
    with pytest.raises(UserError, match=r"model/encoder\.safetensors: the weights have digest"):
        Captioner.load(moved)


@pytest.mark.parametrize(
    ("old", "new", "facts"),
    [
        ('"resnet18"', '"fasterrcnn_resnet50_fpn"', ["encoder.architecture", "'resnet18'"]),
        ('"resnet18"', '"resnet50"', ["resnet50 up to layer2", "4 x 4 x 512", "4 x 4 x 128"]),
        ('"image_width": 32', '"image_width": 16', ["encoder"]),
    ],
)
def test_a_config_that_does_not_fit_together_is_an_error_without_network(
    moved: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, old: str, new: str, facts: list[str]
) -> None:
    path = moved / "config.json"
    text = path.read_text()
    assert old in text
    config = json.loads(text.replace(old, new))
    spec = EncoderSpec(**config["encoder"])
    changes = {"encoder_fingerprint": spec.fingerprint, "encoder_weights": "a" * 5000}
    path.write_text(json.dumps(config))
    edit(path, changes)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connects to a network"))
    result = gridcap("predict", tiny.images / "00.png", "--model", moved)
    assert isinstance(result.exception, UserError)
    message = str(result.exception)
    assert message.startswith(f"{path}: ")
    assert all(fact in message for fact in facts), message
    assert "\n" not in message


def test_a_recorded_path_that_no_file_can_have_is_searched_for_like_any_other(moved: Path) -> None:
    for name in ("a" * 5000, "a\0b", ".", "/dev/zero"):
        record_provenance(moved, "images", name)
        with pytest.raises(UserError, match="resnet18 up to layer2"):
            Captioner.load(moved)


@pytest.mark.parametrize("name", ["nowhere.safetensors", "."])
def test_named_weights_that_cannot_be_read_are_an_error(tiny: Tiny, tmp_path: Path, name: str) -> None:
    path, image = tmp_path / name, tiny.images / "00.png"
    result = gridcap("predict", image, "--model", tiny.model, "--encoder-weights", path)
    assert isinstance(result.exception, UserError)
    for fact in (str(path), "cannot be read", "--encoder-weights"):
        assert fact in str(result.exception)
