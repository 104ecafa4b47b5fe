import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torchvision
from ruamel.yaml import YAML

from pipeline import downloads
from pipeline.errors import UserError
from pipeline.features import pretrained
from pipeline.features.pretrained import cached_path, download_weights, fetch, pretrained_url
from tests.file_server import FileServer, file_server
from tests.paths import ROOT

CONTENT = b"not really weights"
FILE_NAME = f"resnet18-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PyTorch hub cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server with one weights file."""
    monkeypatch.setattr(downloads, "RETRY_DELAY", 0.001)
    with file_server() as server:
        server.files[FILE_NAME] = CONTENT
        yield server


def use_registry(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make `url` the URL of all weights in torchvision's registry."""
    weights = SimpleNamespace(url=url)
    monkeypatch.setattr(pretrained, "_weights", lambda _name: weights)


def test_a_file_is_fetched_into_the_hub_cache_once(server, hub_cache):
    first = fetch(f"{server.address}/{FILE_NAME}")
    second = fetch(f"{server.address}/{FILE_NAME}")

    assert first == second == cached_path(FILE_NAME) == hub_cache / FILE_NAME
    assert first.read_bytes() == CONTENT
    assert list(hub_cache.iterdir()) == [first]
    assert len(server.requests) == 1


def test_a_download_with_another_digest_leaves_no_file(server, hub_cache):
    server.files["resnet18-00000000.pth"] = CONTENT

    with pytest.raises(UserError, match="other bytes than expected"):
        fetch(f"{server.address}/resnet18-00000000.pth")

    assert list(hub_cache.iterdir()) == []


def test_a_failed_download_names_file_and_url(server, hub_cache):
    del server.files[FILE_NAME]

    with pytest.raises(UserError) as error:
        fetch(f"{server.address}/{FILE_NAME}")

    assert str(error.value).startswith(f"{hub_cache / FILE_NAME}: ")
    assert f"{server.address}/{FILE_NAME}" in str(error.value)
    assert list(hub_cache.iterdir()) == []


def test_weights_are_downloaded_into_a_folder_once(tmp_path, server, hub_cache, monkeypatch):
    folder = tmp_path / "data" / "weights"
    use_registry(monkeypatch, f"{server.address}/{FILE_NAME}")
    first = download_weights("resnet18", folder)
    second = download_weights("resnet18", folder)

    assert first == second == folder / FILE_NAME
    assert first.read_bytes() == CONTENT
    assert list(folder.iterdir()) == [first]
    assert not hub_cache.exists()


def test_a_damaged_file_is_downloaded_again(tmp_path, server, monkeypatch):
    path = tmp_path / FILE_NAME
    path.write_bytes(CONTENT[:-1])
    use_registry(monkeypatch, f"{server.address}/{FILE_NAME}")
    download_weights("resnet18", tmp_path)

    assert path.read_bytes() == CONTENT


def test_weights_in_the_hub_cache_are_copied_without_a_network(tmp_path, hub_cache, monkeypatch):
    hub_cache.mkdir(parents=True)
    (hub_cache / FILE_NAME).write_bytes(CONTENT)
    use_registry(monkeypatch, f"http://127.0.0.1:1/{FILE_NAME}")

    path = download_weights("resnet18", tmp_path / "weights")

    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == [FILE_NAME]


def test_a_damaged_file_is_replaced_from_the_hub_cache(tmp_path, hub_cache, monkeypatch):
    hub_cache.mkdir(parents=True)
    (hub_cache / FILE_NAME).write_bytes(CONTENT)
    (tmp_path / FILE_NAME).write_bytes(CONTENT[:-1])
    use_registry(monkeypatch, f"http://127.0.0.1:1/{FILE_NAME}")

    assert download_weights("resnet18", tmp_path).read_bytes() == CONTENT


def test_damaged_weights_in_the_hub_cache_are_not_used(tmp_path, server, hub_cache, monkeypatch):
    hub_cache.mkdir(parents=True)
    (hub_cache / FILE_NAME).write_bytes(CONTENT[:-1])
    use_registry(monkeypatch, f"{server.address}/{FILE_NAME}")
    path = download_weights("resnet18", tmp_path / "weights")

    assert path.read_bytes() == CONTENT


def test_a_mirror_replaces_the_server_of_torchvision(tmp_path, server, monkeypatch):
    use_registry(monkeypatch, f"http://127.0.0.1:1/models/{FILE_NAME}")

    assert download_weights("resnet18", tmp_path, f"{server.address}/").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "file_name"),
    [
        ("resnet50", "resnet50-11ad3fa6.pth"),
        ("resnet50/IMAGENET1K_V1", "resnet50-0676ba61.pth"),
        ("resnet18", "resnet18-f37072fd.pth"),
    ],
)
def test_the_default_weights_are_those_of_torchvision(tmp_path, name, file_name, monkeypatch):
    urls = []
    monkeypatch.setattr(pretrained, "_download", lambda url, path: urls.append(url) or path)

    assert download_weights(name, tmp_path) == tmp_path / file_name
    assert urls == [pretrained_url(file_name)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet99", ["resnet99", "resnet152"]),
        ("vgg16", ["vgg16", "resnet18"]),
        ("resnet18/IMAGENET1K_V2", ["IMAGENET1K_V2", "resnet18/IMAGENET1K_V1"]),
    ],
)
def test_an_unknown_name_is_an_error_that_lists_valid_names(tmp_path, name, expected):
    with pytest.raises(UserError) as error:
        download_weights(name, tmp_path)

    assert all(part in str(error.value) for part in expected)


def test_a_url_is_found_by_file_name():
    weights = torchvision.models.ResNet101_Weights.IMAGENET1K_V2

    assert pretrained_url(weights.url.rsplit("/", 1)[-1]) == weights.url
    assert pretrained_url("encoder.safetensors") is None


@pytest.mark.parametrize("page", ["docs/encoding.md", "data/weights/README.md"])
def test_pages_name_files_of_torchvision(page):
    file_names = re.findall(r"resnet\d+-[0-9a-f]{8}\.pth", (ROOT / page).read_text())

    assert file_names
    assert all(pretrained_url(file_name) for file_name in file_names)


@pytest.mark.parametrize("preset", ["flickr8k", "coco"])
def test_presets_name_the_file_that_gridcap_download_writes(preset):
    params = YAML(typ="safe").load((ROOT / "presets" / f"{preset}.yaml").read_text())["encode"]
    weights = torchvision.models.get_model_weights(params["architecture"]).DEFAULT

    assert params["weights"] == f"data/weights/{weights.url.rsplit('/', 1)[-1]}"
