"""The encoder of a model folder: found by the digest of its weights, wherever they lie."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torchvision

from pipeline.decoder.model_io import ModelConfig
from pipeline.errors import UserError
from pipeline.features.encoder import (
    Architecture,
    GridEncoder,
    Layer,
    read_encoder,
    weights_digest,
)
from pipeline.features.pretrained import cached_path, fetch

BESIDE = ("encoder.safetensors", "encoder.pth", "encoder.pt")
"""Names in a model folder under which the encoder's weights may travel with it."""


def find_encoder(folder: Path, config: ModelConfig, given: Path | None, download: bool) -> GridEncoder:
    """Load the encoder whose grids the model in `folder` was trained on.

    Its weights are the file `given`, or one beside the model, or else the one that the training run named: a path, from
    the working folder or from a folder above the model, or torchvision's name of weights in PyTorch's cache, which are
    downloaded only where `download` says so.

    Raises `UserError` where the file given cannot be read, where that or the one beside the model has another digest,
    and, saying where was looked, where there is none with it.
    """
    if given and not (os.path.isfile(given) and os.access(given, os.R_OK)):
        raise UserError(f"{given}: is no file that can be read; name the encoder's weights by --encoder-weights")
    for path in [given] if given else [folder / name for name in BESIDE if (folder / name).is_file()]:
        encoder = _read(path, config)
        found = weights_digest(encoder)
        if found != config.encoder.weights_digest:
            raise UserError(
                f"{path}: has encoder weights of digest {found[:16]}..., but {folder} was trained on grids of"
                f" {config.encoder.weights_digest[:16]}...; name the weights that it was trained with by"
                " --encoder-weights"
            )
        return encoder
    looked = []
    for path in _named(folder, config, download):
        looked.append(str(path))
        if path.is_file():
            encoder = _read(path, config)
            if weights_digest(encoder) == config.encoder.weights_digest:
                return encoder
            looked[-1] += " (of another digest)"
    encoder_of = f"{config.encoder.architecture} up to {config.encoder.layer}"
    raise UserError(
        f"{folder}: needs the weights of its encoder ({encoder_of}, digest {config.encoder.weights_digest[:16]}...),"
        f" which are not at {', '.join([*(str(folder / name) for name in BESIDE[:1]), *looked])}; name their file by"
        " --encoder-weights, or, for weights of torchvision, allow to --download them"
    )


def _read(path: Path, config: ModelConfig) -> GridEncoder:
    # A model folder holds what `encode` wrote of itself, so these are names that it knows.
    architecture, layer = cast(Architecture, config.encoder.architecture), cast(Layer, config.encoder.layer)
    return read_encoder(path, architecture, layer)


def _named(folder: Path, config: ModelConfig, download: bool) -> Iterator[Path]:
    """Files that the training run may have meant, the likeliest first."""
    name = config.encoder_weights
    if name is None:
        return
    if name.endswith((".safetensors", ".pth", ".pt")):
        yield Path(name)
        elsewhere = dict.fromkeys(above / name for above in folder.resolve().parents)
        yield from (path for path in elsewhere if path.is_file() and path != Path(name).resolve())
        return
    known = torchvision.models.get_model_weights(config.encoder.architecture)
    if name in known.__members__:
        url = known[name].url
        yield fetch(url) if download else cached_path(url.rsplit("/", 1)[-1])
