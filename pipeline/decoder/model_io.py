"""The model folder: decoder weights, configuration, vocabulary and training history.

Together with the encoder's weights, it contains everything that captioning needs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, cast

import safetensors.torch
from pydantic import Field, FiniteFloat
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import TypedDict

from pipeline.artifacts import (
    Int64,
    Schema,
    Sha256,
    read_bytes,
    read_document,
    read_json,
    write_atomically,
    write_document,
    write_json,
)
from pipeline.captions.vocabulary import VOCABULARY_FILE, Vocabulary, read_vocabulary, write_vocabulary
from pipeline.decoder.decoder import Decoder, DecoderParams
from pipeline.decoder.registry import build_decoder
from pipeline.errors import UserError
from pipeline.features.store import EncoderSpec
from pipeline.features.views import View

SCHEMA = Schema("gridcap.model", 9)
WEIGHTS_FILE = "decoder.safetensors"
CONFIG_FILE = "config.json"
HISTORY_FILE = "history.json"
REFINE_HISTORY_FILE = "refine_history.json"

REMEDY = "Use a complete model folder of this version of gridcap, from `dvc repro refine` or `gridcap export`."
"""What to do about a missing or damaged file of a model folder."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Size of the data that a decoder was trained and validated on."""

    num_images: Int64
    """Images of the train split."""
    num_captions: Int64
    """Captions of the train split."""
    num_val_images: Int64
    """Images of the validation split."""
    num_text_captions: Int64
    """Captions without images that the decoder was trained on; 0 without text."""


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Self-critical training of a trained model, whose own training the other fields of `ModelConfig` describe."""

    trained_fingerprint: str
    """Fingerprint of the run that trained the model by cross-entropy."""
    epoch: Annotated[Int64, Field(ge=0)]
    """Epoch of self-critical training at whose end these weights were saved; 0 if the trained model was kept."""
    selected_by: str
    """Metric of greedy validation captions that selected the epoch, or `last`."""


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """The model that the initial weights came from, and what was kept of it."""

    fingerprint: str
    """Fingerprint of the run that wrote it."""
    dataset: str | None
    """Dataset folder of that run; None if unknown."""
    encoder_weights: str | None
    """Path of the encoder's weights of that run; None if unknown."""
    num_kept_words: Annotated[Int64, Field(ge=0)]
    """Words of both vocabularies, without special tokens."""
    num_new_words: Annotated[Int64, Field(ge=0)]
    """Words that only the new vocabulary has."""
    num_dropped_words: Annotated[Int64, Field(ge=0)]
    """Words that only the vocabulary of the initial weights has."""
    new_input_projection: bool
    """Whether the weights that read grids were drawn anew, for the features of another encoder."""
    warm_start: "WarmStart | None"
    """The model that the initial weights of that model came from; None if they were random."""

    @property
    def summary(self) -> str:
        """What was kept of the model."""
        encoder = "new input projection for another encoder" if self.new_input_projection else "same encoder"
        return (
            f"{self.num_kept_words:,} words kept, {self.num_new_words:,} new, {self.num_dropped_words:,} dropped,"
            f" {encoder}"
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configuration of a decoder, and how it was trained."""

    fingerprint: str
    """Fingerprint of the run that wrote the weights: params, inputs, code and versions."""
    decoder: DecoderParams
    """Kind, sizes and dropout of the decoder."""
    vocabulary_digest: str
    """Digest of the vocabulary."""
    encoder: EncoderSpec
    """Encoder that computed the grids."""
    encoder_fingerprint: str
    """Fingerprint of the encoder and the image preprocessing."""
    view: View
    """View of an image to caption."""
    data: TrainingData
    """Size of the training data."""
    epoch: Annotated[Int64, Field(ge=1)]
    """Epoch of cross-entropy training, counted from 1, at whose end the weights were saved."""
    selected_by: str
    """Metric of greedy validation captions that selected the epoch, or `last`."""
    versions: dict[str, str]
    """Versions of the packages that the decoder was trained with."""
    dataset: str | None = None
    """Dataset folder, as in the params of the training run; None if unknown."""
    encoder_weights: str | None = None
    """Path of the encoder's weights, as in the params of the training run; None if unknown."""
    warm_start: WarmStart | None = None
    """Where the initial weights came from; None if they were random."""
    refinement: Refinement | None = None
    """Self-critical training of the weights; None if there was none."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A decoder in evaluation mode with its vocabulary and configuration."""

    decoder: Decoder
    vocabulary: Vocabulary
    config: ModelConfig


class _WeightsDigest(TypedDict):
    """The key of the config file that is not a field of `ModelConfig`."""

    weights_digest: Sha256
    """SHA-256 of the weights file."""


class _ValidationMetrics(TypedDict):
    """What the histories of cross-entropy and self-critical training have in common."""

    epoch: Int64
    val_loss: FiniteFloat
    val_accuracy: FiniteFloat
    val_bleu4: FiniteFloat
    val_cider: FiniteFloat | None


class _EpochMetrics(_ValidationMetrics):
    """A row of the history."""

    train_loss: FiniteFloat


class _RefineEpochMetrics(_ValidationMetrics):
    """A row of the history of self-critical training."""

    train_reward: FiniteFloat | None


History = Sequence[Mapping[str, float | None]]
"""Metrics of each epoch. Key `epoch` is the epoch; a metric that is not defined is None."""


def model_files(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the files of a model folder."""
    refine_files = () if config.refinement is None else (REFINE_HISTORY_FILE,)
    return (WEIGHTS_FILE, CONFIG_FILE, VOCABULARY_FILE, HISTORY_FILE, *refine_files)


def write_model(folder: Path, weights: dict[str, Tensor], vocabulary: Vocabulary, config: ModelConfig) -> None:
    """Write a model folder without its histories, which `write_history` and `write_refine_history` add.

    Args:
        folder: Folder to write to, created if necessary.
        weights: State dict of the decoder.
        vocabulary: Vocabulary of the decoder.
        config: Configuration of the decoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = safetensors.torch.save(weights)
    write_atomically(folder / WEIGHTS_FILE, content)
    write_vocabulary(folder / VOCABULARY_FILE, vocabulary)
    _write_config(folder, config, sha256(content).hexdigest())


def record_provenance(folder: Path, dataset: str | None, encoder_weights: str | None) -> ModelConfig:
    """Record in a model folder where its training data came from.

    Provenance is not part of the run's fingerprint: the same data at another path trains the same model.

    Args:
        folder: Model folder.
        dataset: Dataset folder; None if unknown.
        encoder_weights: Path of the encoder's weights; None if unknown.

    Returns:
        The new configuration.
    """
    config, weights_digest = _read_config(folder)
    config = replace(config, dataset=dataset, encoder_weights=encoder_weights)
    _write_config(folder, config, weights_digest)
    return config


def read_model(folder: Path) -> TrainedModel:
    """Read a model folder. The decoder is in evaluation mode, on the CPU.

    Raises:
        UserError: A file is missing, damaged, of another schema or from another model; or this version of gridcap
            encodes images differently from the version that trained the model.
    """
    config, weights_digest = _read_config(folder)
    vocabulary = read_vocabulary(folder / VOCABULARY_FILE, REMEDY)
    if vocabulary.digest != config.vocabulary_digest:
        raise UserError(
            f"{folder / VOCABULARY_FILE}: has digest {vocabulary.digest}, but {CONFIG_FILE} records"
            f" {config.vocabulary_digest}. {REMEDY}"
        )
    path = folder / WEIGHTS_FILE
    content = read_bytes(path, REMEDY)
    if sha256(content).hexdigest() != weights_digest:
        raise UserError(f"{path}: SHA-256 differs from the one recorded in {CONFIG_FILE}. {REMEDY}")
    try:
        weights = safetensors.torch.load(content)
        with _SkipInitialization():
            decoder = build_decoder(config.decoder, config.encoder.grid, config.encoder.channels, len(vocabulary))
        decoder.load_state_dict(weights)
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("weights are not finite")
    except (RuntimeError, LookupError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: does not match {CONFIG_FILE}: {' '.join(str(error).split())}. {REMEDY}") from error
    if config.encoder.fingerprint != config.encoder_fingerprint:
        raise UserError(
            f"{folder / CONFIG_FILE}: records encoder fingerprint {config.encoder_fingerprint}, but this version of"
            f" gridcap computes {config.encoder.fingerprint}. Its grids would differ from those of the training run."
            " Use the version that wrote the model, or train again."
        )
    return TrainedModel(decoder=decoder.eval(), vocabulary=vocabulary, config=config)


class _SkipInitialization(TorchFunctionMode):
    """Leaves the weights of new modules uninitialized, which takes neither time nor memory, whatever their sizes.

    The meta device would do so too, but imports PyTorch's compiler to draw random numbers.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        if getattr(func, "__module__", None) == nn.init.__name__:
            return (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def write_history(folder: Path, history: History) -> None:
    """Write the metrics of each epoch of cross-entropy training to a model folder."""
    write_json(folder / HISTORY_FILE, history)


def write_refine_history(folder: Path, history: History) -> None:
    """Write the metrics of each epoch of self-critical training to a model folder."""
    write_json(folder / REFINE_HISTORY_FILE, history)


def read_history(folder: Path, config: ModelConfig) -> History:
    """Read the metrics of each epoch of cross-entropy training, counted from 1, from a model folder.

    Args:
        folder: Model folder.
        config: Configuration of the model.

    Raises:
        UserError: The history is missing or damaged, or lacks an epoch.
    """
    path = folder / HISTORY_FILE
    history = read_json(path, list[_EpochMetrics], REMEDY)
    _check_epochs(path, history, 1, config.epoch)
    return cast(History, history)


def read_refine_history(folder: Path, config: ModelConfig) -> History:
    """Read the metrics of each epoch of self-critical training from a model folder; empty if there was none.

    Epoch 0 is the trained model, which has no `train_reward`.

    Args:
        folder: Model folder.
        config: Configuration of the model.

    Raises:
        UserError: The history is missing or damaged, or lacks an epoch.
    """
    if config.refinement is None:
        return []
    path = folder / REFINE_HISTORY_FILE
    history = read_json(path, list[_RefineEpochMetrics], REMEDY)
    _check_epochs(path, history, 0, config.refinement.epoch)
    return cast(History, history)


def _check_epochs(path: Path, history: Sequence[_ValidationMetrics], first: int, selected: int) -> None:
    """Check that the epochs of a history are consecutive and include the one of the weights."""
    epochs = [metrics["epoch"] for metrics in history]
    if epochs != list(range(first, first + len(history))):
        last = first + len(history) - 1
        raise UserError(f"{path}: the epochs are not {first} to {last}, in ascending order. {REMEDY}")
    if selected not in epochs:
        raise UserError(f"{path}: has {len(history)} epochs, but the weights are from epoch {selected}. {REMEDY}")


def _write_config(folder: Path, config: ModelConfig, weights_digest: str) -> None:
    write_document(folder / CONFIG_FILE, SCHEMA, {"weights_digest": weights_digest, **asdict(config)})


def _read_config(folder: Path) -> tuple[ModelConfig, str]:
    """Return the configuration, and the SHA-256 of the weights file."""
    path = folder / CONFIG_FILE
    config = read_document(path, ModelConfig, REMEDY, SCHEMA)
    return config, read_json(path, _WeightsDigest, REMEDY)["weights_digest"]
