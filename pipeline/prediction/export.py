"""Model folders that travel: a checked copy, with the encoder where asked to."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import fresh_folder, publish, write_atomically
from pipeline.decoder.model_io import HISTORY_FILE, MODEL_FILES, REMEDY, read_model
from pipeline.errors import UserError
from pipeline.prediction.weights import BESIDE, find_encoder
from pipeline.report.model_card import CARD_FILE, write_model_card


def export(
    model: Path, out: Path, with_encoder: bool, scores: Path | None, encoder_weights: Path | None, download: bool
) -> None:
    """Copy a model folder to `out`, which must not be there; with `scores`, from `evaluate`, the card tells them.

    With the encoder its weights are put in, as far as the layers that are used; they are found as for prediction.
    Raises `UserError` where `out` exists, and where the model, its history, the scores or the weights are missing or
    damaged.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; name a folder that does not")
    trained = read_model(model)
    found = None if scores is None else _read_scores(scores)
    history = _check_history(model / HISTORY_FILE, trained.config.epoch)
    with fresh_folder(out) as folder:
        for name in MODEL_FILES:
            shutil.copyfile(model / name, folder / name)
        write_model_card(folder / CARD_FILE, trained.config, history, found)
        if with_encoder:
            encoder = find_encoder(model, trained.config, encoder_weights, download)
            weights = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
            write_atomically(folder / BESIDE[0], safetensors.torch.save(weights))
        publish(folder, out)


@dataclass(frozen=True)
class _Epoch:
    """What the card tells of an epoch."""

    val_loss: float
    val_accuracy: float
    val_bleu4: float
    val_cider: float


def _check_history(path: Path, epoch: int) -> list[dict[str, float]]:
    """Give a history; raise `UserError` where it does not tell the epoch after which the weights were kept."""
    try:
        history = TypeAdapter(list[_Epoch]).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {REMEDY}") from error
    except ValidationError as error:
        first = error.errors()[0]
        found = " ".join([*map(str, first["loc"]), first["msg"]])
        raise UserError(f"{path}: is no history of a training run ({found}). {REMEDY}") from error
    if len(history) < epoch:
        raise UserError(f"{path}: tells {len(history)} epochs, but the weights are those after epoch {epoch}. {REMEDY}")
    return [asdict(one) for one in history]


def _read_scores(path: Path) -> Mapping[str, Any]:
    """Each score with its value and its protocol, as the card takes them."""
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as scores ({error}); name what `evaluate` wrote") from error
    protocol = scores.get("protocol") if isinstance(scores, dict) else None
    measured = [name for name in protocol if isinstance(scores.get(name), float)] if isinstance(protocol, dict) else []
    if not measured:
        raise UserError(f"{path}: holds no scores; name what `evaluate` wrote, such as results/metrics/scores.json")
    for name in measured:
        told = scores["protocol"][name]
        if not isinstance(told, list) or not all(isinstance(line, str) for line in told):
            raise UserError(f"{path}: protocol.{name} must be a list of texts; name what `evaluate` wrote")
        if not math.isfinite(scores[name]):
            raise UserError(f"{path}: {name} is {scores[name]}, which is no score; name what `evaluate` wrote")
    return dict(scores)
