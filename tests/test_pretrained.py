import hashlib
import re
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest
import torchvision
from ruamel.yaml import YAML

from pipeline.errors import UserError
from pipeline.features import pretrained
from pipeline.features.pretrained import cached_path, download_weights, fetch, pretrained_url
from tests.paths import ROOT

CONTENT = b"not really weights"
FILE_NAME = f"resnet18-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def http_server(folder: Path) -> Iterator[str]:
    """Serve a folder on a loopback port and yield the address."""
    with HTTPServer(("127.0.0.1", 0), partial(SilentHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PyTorch hub cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A folder for the server, with one weights file."""
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / FILE_NAME).write_bytes(CONTENT)
    return folder


def use_registry(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make `url` the URL of all weights in torchvision's registry."""
    weights = SimpleNamespace(url=url)
    monkeypatch.setattr(pretrained, "_weights", lambda _name: weights)


def test_a_file_is_fetched_into_the_hub_cache_once(remote, hub_cache):
    with http_server(remote) as address:
        first = fetch(f"{address}/{FILE_NAME}")
    second = fetch(f"{address}/{FILE_NAME}")

    assert first == second == cached_path(FILE_NAME) == hub_cache / FILE_NAME
    assert first.read_bytes() == CONTENT
    assert list(hub_cache.iterdir()) == [first]


def test_a_download_with_another_digest_leaves_no_file(remote, hub_cache):
    (remote / FILE_NAME).rename(remote / "resnet18-00000000.pth")

    with http_server(remote) as address, pytest.raises(UserError, match="invalid hash"):
        fetch(f"{address}/resnet18-00000000.pth")

    assert list(hub_cache.iterdir()) == []


def test_a_failed_download_names_file_and_url(remote, hub_cache):
    with http_server(remote) as address:
        pass

    with pytest.raises(UserError) as error:
        fetch(f"{address}/{FILE_NAME}")

    assert str(error.value).startswith(f"{hub_cache / FILE_NAME}: ")
    assert f"{address}/{FILE_NAME}" in str(error.value)
    assert list(hub_cache.iterdir()) == []


def test_a_full_disk_is_named_with_its_free_space(remote, hub_cache):
    # A limit of the file size fails like a full disk, and needs no mount.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with http_server(remote) as address:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
        try:
            with pytest.raises(UserError, match=f"{FILE_NAME}: cannot be written .* bytes are free now. Free disk"):
                fetch(f"{address}/{FILE_NAME}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(hub_cache.iterdir()) == []


def test_weights_are_downloaded_into_a_folder_once(tmp_path, remote, hub_cache, monkeypatch):
    folder = tmp_path / "data" / "weights"
    with http_server(remote) as address:
        use_registry(monkeypatch, f"{address}/{FILE_NAME}")
        first = download_weights("resnet18", folder)
    second = download_weights("resnet18", folder)

    assert first == second == folder / FILE_NAME
    assert first.read_bytes() == CONTENT
    assert list(folder.iterdir()) == [first]
    assert not hub_cache.exists()


def test_a_damaged_file_is_downloaded_again(tmp_path, remote, monkeypatch):
    path = tmp_path / FILE_NAME
    path.write_bytes(CONTENT[:-1])
    with http_server(remote) as address:
        use_registry(monkeypatch, f"{address}/{FILE_NAME}")
        download_weights("resnet18", tmp_path)

    assert path.read_bytes() == CONTENT


def test_weights_in_the_hub_cache_are_copied_without_a_network(tmp_path, hub_cache, monkeypatch):
    hub_cache.mkdir(parents=True)
    (hub_cache / FILE_NAME).write_bytes(CONTENT)
    use_registry(monkeypatch, f"http://127.0.0.1:1/{FILE_NAME}")

    path = download_weights("resnet18", tmp_path / "weights")

    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == [FILE_NAME]


def test_damaged_weights_in_the_hub_cache_are_not_used(tmp_path, remote, hub_cache, monkeypatch):
    hub_cache.mkdir(parents=True)
    (hub_cache / FILE_NAME).write_bytes(CONTENT[:-1])
    with http_server(remote) as address:
        use_registry(monkeypatch, f"{address}/{FILE_NAME}")
        path = download_weights("resnet18", tmp_path / "weights")

    assert path.read_bytes() == CONTENT


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
