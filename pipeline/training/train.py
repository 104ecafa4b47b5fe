"""A training run in its work folder: from tokens and features to a finished model folder."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import pipeline
from pipeline.artifacts import file_digest, fingerprint, fresh_folder, publish
from pipeline.captions.tokens import TOKENS_FILE, read_tokens, require_vocabulary
from pipeline.captions.vocabulary import VOCABULARY_FILE, read_vocabulary
from pipeline.decoder.model_io import ModelConfig, TrainingData, read_history, read_model, write_history, write_model
from pipeline.distributed import SINGLE_PROCESS, Processes
from pipeline.errors import UserError
from pipeline.features.store import INDEX_FILE, FeatureStore
from pipeline.import_graph import code_digest
from pipeline.params import to_plain
from pipeline.training.live_metrics import LiveMetrics
from pipeline.training.loop import Intervals, run_training
from pipeline.training.trainer import Trainer, TrainParams

logger = logging.getLogger("gridcap")

CHECKPOINT_FILE = "checkpoint.safetensors"
MODEL_FOLDER = "model"


@dataclass(frozen=True, kw_only=True)
class TrainPaths:
    """Folders that a training run reads and works in."""

    tokens: Path
    """Tokens and vocabulary, from `tokenize`."""
    features: Path
    """Feature store, from `encode`."""
    work: Path
    """Root of the work folders; the fingerprint of a run names its folder."""
    live: Path
    """Live metrics."""


@contextmanager
def train(
    params: TrainParams,
    paths: TrainPaths,
    device: torch.device,
    intervals: Intervals,
    processes: Processes = SINGLE_PROCESS,
) -> Iterator[Path]:
    """Train a decoder or resume its training. The lock of the work folder is held while the caller publishes the model.

    Every process must call this with the same arguments; rank 0 writes.

    Args:
        params: Architecture and training of the decoder.
        paths: Folders to read and to work in.
        device: Device to train on.
        intervals: How often to write checkpoints and live metrics.
        processes: The processes that share every batch.

    Yields:
        The finished model folder, inside the run's work folder.

    Raises:
        UserError: An input is missing or damaged, or the loss is not finite.
    """
    run = run_fingerprint(params, paths, processes.world_size)
    with processes.work_folder(paths.work, "train", run) as folder:
        yield train_in(folder, params, paths, device, intervals, processes)


def run_fingerprint(params: TrainParams, paths: TrainPaths, world_size: int) -> str:
    """Compute the fingerprint of everything that determines the weights of a run."""
    return fingerprint(
        params=to_plain(params),
        tokens=file_digest(paths.tokens / TOKENS_FILE),
        vocabulary=file_digest(paths.tokens / VOCABULARY_FILE),
        features=file_digest(paths.features / INDEX_FILE),
        code=code_digest("pipeline.training.trainer"),
        torch=torch.__version__,
        processes=world_size,
    )


def train_in(
    folder: Path,
    params: TrainParams,
    paths: TrainPaths,
    device: torch.device,
    intervals: Intervals,
    processes: Processes = SINGLE_PROCESS,
) -> Path:
    """Train in a folder that no other run uses.

    Args:
        folder: Folder of the run. Its name is recorded as the fingerprint of the model.
        params: As for `train`.
        paths: As for `train`; `paths.work` is not used.
        device: As for `train`.
        intervals: As for `train`.
        processes: As for `train`.

    Returns:
        The finished model folder.

    Raises:
        UserError: As for `train`.
    """
    model = folder / MODEL_FOLDER
    if processes.broadcast(_is_intact(model) if processes.is_main else False):
        if processes.is_main:
            logger.info("train: %s is up to date, nothing to do", model)
        return model
    vocabulary = read_vocabulary(paths.tokens / VOCABULARY_FILE)
    require_vocabulary(paths.tokens / TOKENS_FILE, vocabulary)
    # No step is taken with altered grids. To verify all shards first would delay it by minutes: COCO has 25 GB.
    store = FeatureStore(paths.features, verify_reads=True)
    train_captions, val_captions = (
        read_tokens(paths.tokens / TOKENS_FILE, split, store.skipped_ids) for split in ("train", "val")
    )
    checkpoint = folder / CHECKPOINT_FILE
    trainer = Trainer(
        params=params,
        train=train_captions,
        val=val_captions,
        store=store,
        vocabulary=vocabulary,
        checkpoint=checkpoint,
        device=device,
        processes=processes,
    )
    if processes.is_main and trainer.is_resumed:
        progress = trainer.progress
        logger.info("train: resuming from %s: epoch %d, batch %d", checkpoint, progress.epoch + 1, progress.batch)
    run_training(trainer, intervals, LiveMetrics(paths.live, trainer.global_step) if processes.is_main else None)
    if processes.is_main:
        data = TrainingData(
            num_images=len(set(train_captions.image_id.tolist())),
            num_captions=len(train_captions.image_id),
            num_val_images=len(set(val_captions.image_id.tolist())),
        )
        _write_model(model, trainer, _model_config(folder.name, trainer, store, data))
        checkpoint.unlink()
    return model


def _model_config(run: str, trainer: Trainer, store: FeatureStore, data: TrainingData) -> ModelConfig:
    params = trainer.params
    return ModelConfig(
        fingerprint=run,
        decoder=params.decoder,
        vocabulary_digest=trainer.vocabulary.digest,
        encoder=store.spec,
        encoder_fingerprint=store.fingerprint,
        view=store.views[0],
        data=data,
        epoch=trainer.progress.best_epoch,
        selected_by=params.select_by,
        versions={
            "gridcap": pipeline.__version__,
            **{package: version(package) for package in ("torch", "torchvision")},
        },
    )


def _write_model(model: Path, trainer: Trainer, config: ModelConfig) -> None:
    with fresh_folder(model) as folder:
        write_model(folder, trainer.best_weights, trainer.vocabulary, config)
        write_history(folder, trainer.progress.history)
        publish(folder, model)


def _is_intact(model: Path) -> bool:
    """Return whether a finished model can be read; a damaged one is removed."""
    if not model.is_dir():
        return False
    try:
        read_history(model, read_model(model).config)
    except UserError as error:
        logger.warning("train: the finished model is damaged and is trained again (%s)", error)
        shutil.rmtree(model)
        return False
    return True
