"""The encoder of a model: its weights file is located and verified by its digest."""

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.decoder.model_io import CONFIG_FILE, REMEDY, ModelConfig
from pipeline.errors import UserError
from pipeline.features.encoder import GridEncoder, read_encoder, weights_digest
from pipeline.features.resnets import num_channels
from pipeline.features.store import EncoderSpec

ENCODER_FILES = ("encoder.safetensors", "encoder.pth", "encoder.pt")
"""Names of a weights file in a model folder; `gridcap export --with-encoder` writes the first."""


def find_encoder(folder: Path, config: ModelConfig, weights: Path | None, download: bool) -> GridEncoder:
    """Load the encoder that a model was trained with.

    The weights are read from the first of these files that exists. Files 3 and 4 are skipped if their digest differs.

    1. `weights`
    2. one of `ENCODER_FILES` in the model folder
    3. the file recorded by the training run, relative to the working directory or to a folder above the model
    4. a file of that name in PyTorch's cache, if it is one of torchvision's

    Args:
        folder: Model folder.
        config: Configuration of the model.
        weights: File with the encoder's weights; None to search for it.
        download: Download torchvision's weights if they are missing.

    Raises:
        UserError: No file has the weights that the model was trained with, or the configuration is inconsistent.
    """
    _check_sizes(folder, config.encoder)
    if weights and not (os.path.isfile(weights) and os.access(weights, os.R_OK)):
        raise UserError(f"{weights}: cannot be read. Name the encoder's weights with --encoder-weights.")
    for path in [weights] if weights else [folder / name for name in ENCODER_FILES if os.path.isfile(folder / name)]:
        encoder = _read(path, config)
        digest = weights_digest(encoder)
        if digest != config.encoder.weights_digest:
            raise UserError(
                f"{path}: the weights have digest {digest[:16]}..., but {folder} was trained with"
                f" {config.encoder.weights_digest[:16]}... Name the file of those weights with --encoder-weights."
            )
        return encoder
    searched = [str(folder / ENCODER_FILES[0])]
    for path in _recorded_files(folder, config, download):
        searched.append(str(path))
        if os.path.isfile(path):
            encoder = _read(path, config)
            if weights_digest(encoder) == config.encoder.weights_digest:
                return encoder
            searched[-1] += " (another digest)"
    encoder_name = f"{config.encoder.architecture} up to {config.encoder.layer}"
    from pipeline.features.pretrained import pretrained_url

    can_download = config.encoder_weights is not None and pretrained_url(Path(config.encoder_weights).name) is not None
    raise UserError(
        f"{folder}: cannot find the encoder's weights ({encoder_name}, digest"
        f" {config.encoder.weights_digest[:16]}...). Searched {', '.join(searched)}. Name the file with"
        f" --encoder-weights{', or download them with --download' if can_download else ''}."
    )


def _read(path: Path, config: ModelConfig) -> GridEncoder:
    return read_encoder(path, config.encoder.architecture, config.encoder.layer, config.encoder.pool)


def _check_sizes(folder: Path, spec: EncoderSpec) -> None:
    """Check that the grid that a model records is that of its encoder.

    Raises:
        UserError: Image size, grid and channels do not fit together.
    """
    rows, columns = spec.unpooled_grid
    channels = num_channels(spec.architecture, spec.layer)
    if spec.grid_height > rows or spec.grid_width > columns or spec.channels != channels:
        raise UserError(
            f"{folder / CONFIG_FILE}: encoder: {spec.architecture} up to {spec.layer} encodes {spec.image_height} x"
            f" {spec.image_width} px as at most {rows} x {columns} x {channels}, but the file records"
            f" {spec.grid_height} x {spec.grid_width} x {spec.channels}. {REMEDY}"
        )


def _recorded_files(folder: Path, config: ModelConfig, download: bool) -> Iterator[Path]:
    """Yield the paths at which the recorded weights file may be, most likely first."""
    if config.encoder_weights is None:
        return
    recorded = Path(config.encoder_weights)
    yield recorded
    candidates = dict.fromkeys(parent / recorded for parent in folder.resolve().parents)
    yield from (path for path in candidates if os.path.isfile(path) and path != recorded.resolve())
    from pipeline.features.pretrained import cached_path, fetch, pretrained_url  # imported here: it takes a second

    url = pretrained_url(recorded.name)
    if url is not None:
        yield fetch(url) if download else cached_path(recorded.name)
