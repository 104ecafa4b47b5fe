"""The model folder: decoder weights, configuration and vocabulary, all that captioning needs besides the encoder."""

import json
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import safetensors.torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipeline.artifacts import write_atomically, write_json
from pipeline.captions.vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from pipeline.decoder.soft_attention import DecoderParams, SoftAttentionDecoder
from pipeline.errors import UserError
from pipeline.features.store import EncoderSpec

SCHEMA = "gridcap.model"
SCHEMA_VERSION = 4
WEIGHTS_FILE = "decoder.safetensors"
CONFIG_FILE = "config.json"
VOCABULARY_FILE = "vocabulary.json"
HISTORY_FILE = "history.json"
MODEL_FILES = (WEIGHTS_FILE, CONFIG_FILE, VOCABULARY_FILE, HISTORY_FILE)

MEND = "restore the folder as `train` or `gridcap export` wrote it"
"""What to do where a file of a model folder is missing or damaged."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """How much a decoder was trained and chosen on."""

    images: int
    captions: int
    validation_images: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a decoder was built as, and what it was trained on."""

    fingerprint: str
    """Of the training run: params, inputs, code and versions."""
    decoder: DecoderParams
    vocabulary_digest: str
    encoder: EncoderSpec
    """The encoder that made the grids, as the feature store has it."""
    encoder_fingerprint: str
    """Of that, and of the way from an image file to a grid."""
    view: str
    """What the grids show of a picture: `whole` or a part."""
    data: TrainingData
    epoch: int
    """Epoch, counted from 1, after which these weights were kept."""
    selected_by: str
    """The score of greedy validation captions that chose the epoch, or `last`."""
    versions: dict[str, str]
    """Of what the decoder was trained with, by name of the package."""
    dataset: str | None = None
    """Folder of the dataset, as the params of the run have it."""
    encoder_weights: str | None = None
    """Path or torchvision's name of the encoder's weights, as the params of the run have it."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A decoder ready for captioning, with its vocabulary and configuration."""

    decoder: SoftAttentionDecoder
    vocabulary: Vocabulary
    config: ModelConfig


def write_model(folder: Path, weights: dict[str, Tensor], vocabulary: Vocabulary, config: ModelConfig) -> None:
    """Write the three files of a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = safetensors.torch.save(weights)
    write_atomically(folder / WEIGHTS_FILE, content)
    write_vocabulary(folder / VOCABULARY_FILE, vocabulary)
    _write_config(folder, config, sha256(content).hexdigest())


def record_provenance(folder: Path, dataset: str, encoder_weights: str) -> ModelConfig:
    """Note in a model folder where its inputs came from, and give its configuration then.

    It is no part of training: a dataset or weights that moved make no other model.
    """
    config, weights_digest = _read_config(folder / CONFIG_FILE)
    noted = replace(config, dataset=dataset, encoder_weights=encoder_weights)
    _write_config(folder, noted, weights_digest)
    return noted


def read_model(folder: Path) -> TrainedModel:
    """Read a model folder; the decoder is in evaluation mode, on the CPU.

    Raises `UserError`, naming the file, where one is missing, damaged, of another schema, or does not belong to the
    others, or where this version makes other grids of the same images.
    """
    config, weights_digest = _read_config(folder / CONFIG_FILE)
    vocabulary = read_vocabulary(folder / VOCABULARY_FILE, MEND)
    if vocabulary.digest != config.vocabulary_digest:
        raise UserError(
            f"{folder}: vocabulary.json has digest {vocabulary.digest}, but the decoder was trained with "
            f"{config.vocabulary_digest}; {MEND}"
        )
    path = folder / WEIGHTS_FILE
    try:
        decoder = SoftAttentionDecoder(config.decoder, config.encoder.grid, config.encoder.channels, len(vocabulary))
        content = path.read_bytes()
        if sha256(content).hexdigest() != weights_digest:
            raise UserError(f"{path}: its bytes are not those that {CONFIG_FILE} beside it was written with; {MEND}")
        decoder.load_state_dict(safetensors.torch.load(content))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {MEND}") from error
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: does not fit {CONFIG_FILE} beside it ({error}); {MEND}") from error
    if config.encoder.fingerprint != config.encoder_fingerprint:
        raise UserError(
            f"{folder / CONFIG_FILE}: its encoder has fingerprint {config.encoder_fingerprint}, but what is described"
            f" there has {config.encoder.fingerprint} in this version of gridcap: grids would not be those of the"
            f" training; {MEND}, use the version that wrote it, or train again"
        )
    return TrainedModel(decoder=decoder.eval(), vocabulary=vocabulary, config=config)


def _write_config(folder: Path, config: ModelConfig, weights_digest: str) -> None:
    document = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "weights_digest": weights_digest, **asdict(config)}
    write_json(folder / CONFIG_FILE, document)


def _read_config(path: Path) -> tuple[ModelConfig, str]:
    """The configuration, and the SHA-256 of the weights' file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = (document.pop("schema"), document.pop("schema_version"))
        if found != (SCHEMA, SCHEMA_VERSION):
            raise UserError(
                f"{path}: has schema {found[0]} {found[1]}, this version reads {SCHEMA} {SCHEMA_VERSION}; use the"
                " version that wrote it, or train again"
            )
        weights_digest = str(document.pop("weights_digest"))
        return TypeAdapter(ModelConfig).validate_json(json.dumps(document)), weights_digest
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name a folder that `train` or `gridcap export` wrote, such as"
            " data/model after `make repro`"
        ) from error
    except (ValueError, KeyError, AttributeError, TypeError, ValidationError) as error:
        raise UserError(f"{path}: is no model configuration ({' '.join(str(error).split())}); {MEND}") from error
