"""The model folder: decoder weights, configuration and vocabulary, all that captioning needs besides the encoder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipeline.captions.vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from pipeline.decoder.attention import AttentionDecoder, DecoderParams
from pipeline.errors import UserError
from pipeline.publish import write_atomically, write_json

SCHEMA = "gridcap.model"
SCHEMA_VERSION = 2
WEIGHTS_FILE = "decoder.safetensors"
CONFIG_FILE = "config.json"
VOCABULARY_FILE = "vocabulary.json"
HISTORY_FILE = "history.json"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a decoder was built as, and what it was trained on."""

    fingerprint: str
    """Of the training run: params, inputs, code and versions."""
    decoder: DecoderParams
    grid: tuple[int, int]
    """Height and width of the grids it reads, in regions."""
    channels: int
    """Channels of the grids it reads."""
    vocabulary_digest: str
    encoder: dict[str, Any]
    """Description of the encoder that made the grids, as the feature store has it."""
    epoch: int
    """Epoch, counted from 1, after which these weights were best."""
    selected_by: str
    """The score of greedy validation captions that chose the epoch."""
    selection_score: float


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A decoder ready for captioning, with its vocabulary and configuration."""

    decoder: AttentionDecoder
    vocabulary: Vocabulary
    config: ModelConfig


def write_model(folder: Path, weights: dict[str, Tensor], vocabulary: Vocabulary, config: ModelConfig) -> None:
    """Write the three files of a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS_FILE, safetensors.torch.save(weights))
    write_vocabulary(folder / VOCABULARY_FILE, vocabulary)
    write_json(folder / CONFIG_FILE, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(config)})


def read_model(folder: Path) -> SavedModel:
    """Read a model folder; the decoder is in evaluation mode, on the CPU.

    Raises `UserError`, naming the file, where one is missing, damaged, of another schema, or does not belong to the
    others.
    """
    config = _read_config(folder / CONFIG_FILE)
    vocabulary = read_vocabulary(folder / VOCABULARY_FILE)
    if vocabulary.digest != config.vocabulary_digest:
        raise UserError(
            f"{folder}: vocabulary.json has digest {vocabulary.digest}, but the decoder was trained with "
            f"{config.vocabulary_digest}; restore the folder as `train` wrote it"
        )
    decoder = AttentionDecoder(config.decoder, config.grid, config.channels, len(vocabulary))
    try:
        decoder.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))
    except FileNotFoundError as error:
        raise UserError(f"{folder / WEIGHTS_FILE}: no such file; run `dvc repro train`") from error
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{folder / WEIGHTS_FILE}: does not fit {CONFIG_FILE} beside it ({error}); run `dvc repro -f -s train`"
        ) from error
    return SavedModel(decoder=decoder.eval(), vocabulary=vocabulary, config=config)


def _read_config(path: Path) -> ModelConfig:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = (document.pop("schema"), document.pop("schema_version"))
        if found != (SCHEMA, SCHEMA_VERSION):
            raise UserError(f"{path}: has schema {found[0]} {found[1]}, this version reads {SCHEMA} {SCHEMA_VERSION}")
        return TypeAdapter(ModelConfig).validate_json(json.dumps(document))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run `dvc repro train`") from error
    except (json.JSONDecodeError, KeyError, AttributeError, ValidationError) as error:
        raise UserError(f"{path}: is no model configuration ({error}); run `dvc repro -f -s train`") from error
