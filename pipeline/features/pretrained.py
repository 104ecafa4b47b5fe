"""Downloads of torchvision's pretrained ResNets."""

import re
from pathlib import Path
from typing import Any, get_args

import torch
import torchvision

from pipeline.artifacts import publish
from pipeline.downloads import Digest, download, is_intact, locked
from pipeline.errors import UserError
from pipeline.features.resnets import ClipResNet, TorchvisionResNet

# torchvision's file names end in the first digits of the file's SHA-256, such as resnet50-11ad3fa6.pth.
_DIGEST = re.compile(r"-([0-9a-f]{8,})\.")


def download_weights(name: str, folder: Path, mirror: str | None = None) -> Path:
    """Download weights of a ResNet into a folder, unless the folder already has them.

    If PyTorch's hub cache has the weights, they are linked or copied from there.

    Args:
        name: `ARCHITECTURE` or `ARCHITECTURE/NAME`, such as `resnet50/IMAGENET1K_V1`; torchvision's default weights
            if NAME is omitted.
        folder: Where to store the file, under torchvision's file name.
        mirror: URL of a folder to download the file from, instead of torchvision's server.

    Returns:
        The path of the file, whose bytes match the digest in its name.

    Raises:
        UserError: torchvision has no such weights, or the file cannot be downloaded.
    """
    url = _weights(name).url
    path = folder / _file_name(url)
    cached = cached_path(path.name)
    if _is_intact(path):
        return path
    if _is_intact(cached):
        publish(cached, path)
        return path
    return _download(f"{mirror.rstrip('/')}/{path.name}" if mirror else url, path)


def pretrained_url(file_name: str) -> str | None:
    """Return the URL of the ResNet weights of torchvision with this file name, or None if there are none."""
    for architecture in get_args(TorchvisionResNet):
        for weights in torchvision.models.get_model_weights(architecture):
            if _file_name(weights.url) == file_name:
                return str(weights.url)
    return None


def cached_path(file_name: str) -> Path:
    """Return the path of a weights file in PyTorch's hub cache, whether it exists or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / file_name


def fetch(url: str) -> Path:
    """Download a weights file into PyTorch's hub cache, unless the cache already has it.

    Returns:
        The path of the file.

    Raises:
        UserError: The file cannot be downloaded, or its bytes do not match the digest in its name.
    """
    path = cached_path(_file_name(url))
    return path if path.is_file() else _download(url, path)


def _weights(name: str) -> Any:
    """Look up torchvision's weights by `ARCHITECTURE` or `ARCHITECTURE/NAME`."""
    architecture, _, weights_name = name.partition("/")
    if architecture in get_args(ClipResNet):
        raise UserError(
            f"{name}: weights of CLIP are not torchvision's. Download them yourself: section Weights of"
            " docs/encoding.md names the files."
        )
    if architecture not in get_args(TorchvisionResNet):
        names = ", ".join(get_args(TorchvisionResNet))
        raise UserError(f"{name}: unknown architecture {architecture}. Use one of {names}.")
    registered = torchvision.models.get_model_weights(architecture)
    if weights_name not in ("", *registered.__members__):
        names = " or ".join(f"{architecture}/{weights.name}" for weights in registered)
        raise UserError(f"{name}: torchvision has no such weights. Use {names}.")
    return registered[weights_name or "DEFAULT"]


def _file_name(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _digest(file_name: str) -> Digest | None:
    digits = _DIGEST.search(file_name)
    return digits and Digest("sha256", digits[1])


def _is_intact(path: Path) -> bool:
    return path.is_file() and is_intact(path, None, _digest(path.name))


def _download(url: str, path: Path) -> Path:
    """Download a file and check the digest in its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        download(url, path, None, _digest(path.name))
    return path
