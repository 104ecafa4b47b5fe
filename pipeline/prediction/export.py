"""Export of a trained model as a self-contained folder."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired

import safetensors.torch
from pydantic import FiniteFloat
from typing_extensions import TypedDict

from pipeline.artifacts import Int64, fresh_folder, publish, read_json, write_atomically
from pipeline.decoder.model_io import model_files, read_history, read_model, read_refine_history
from pipeline.errors import UserError
from pipeline.generation.search_settings import find_search_settings, write_search_settings
from pipeline.params import shorten
from pipeline.prediction.encoder_weights import ENCODER_FILES, find_encoder
from pipeline.report.model_card import CARD_FILE, write_model_card

_SCORES_REMEDY = "Name a file that `evaluate` wrote, such as results/metrics/scores.json."


def export(
    model: Path, out: Path, with_encoder: bool, scores: Path | None, encoder_weights: Path | None, download: bool
) -> None:
    """Export a model folder with its search settings, a model card and, optionally, its encoder.

    Args:
        model: Model folder.
        out: Folder to create.
        with_encoder: Include the encoder's weights, up to the layer that is used.
        scores: `scores.json` from `evaluate`, for the model card; None for a card without test scores.
        encoder_weights: File with the encoder's weights; None to find it as `Captioner.load` does.
        download: Download torchvision's weights if they are missing.

    Raises:
        UserError: `out` exists, or a file is missing or damaged.
    """
    if out.exists():
        raise UserError(f"{out}: already exists. Name a new folder.")
    config = read_model(model).config
    card_scores = None if scores is None else _read_scores(scores)
    history, refine_history = read_history(model, config), read_refine_history(model, config)
    search = find_search_settings(model, config.fingerprint)
    with fresh_folder(out) as folder:
        for name in model_files(config):
            shutil.copyfile(model / name, folder / name)
        if search is not None:
            write_search_settings(folder, search, config.fingerprint)
        write_model_card(folder / CARD_FILE, config, history, refine_history, card_scores)
        if with_encoder:
            encoder = find_encoder(model, config, encoder_weights, download)
            weights = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
            write_atomically(folder / ENCODER_FILES[0], safetensors.torch.save(weights))
        publish(folder, out)


class _ScoresFile(TypedDict):
    """The keys of `scores.json` that the model card shows besides the scores; each has a value per score."""

    protocol: dict[str, list[str]]
    signature: NotRequired[dict[str, list[str]]]
    intervals: NotRequired[dict[str, list[FiniteFloat] | dict[str, Any]]]
    num_images: NotRequired[Int64]


def _read_scores(path: Path) -> Mapping[str, Any]:
    """Read `scores.json` and check the scores that the model card shows."""
    protocols = read_json(path, _ScoresFile, _SCORES_REMEDY)["protocol"]
    scores = read_json(path, dict[str, Any], _SCORES_REMEDY)
    names = [name for name in protocols if isinstance(scores.get(name), float | int)]
    if not names:
        raise UserError(f"{path}: contains no scores. {_SCORES_REMEDY}")
    for name in names:
        if not abs(scores[name]) <= sys.float_info.max:
            value = shorten(str(scores[name]))
            raise UserError(f"{path}: {name}: must be a finite number, got {value}. {_SCORES_REMEDY}")
    return scores
