"""A training run in its work folder: from tokens and features to a finished model folder."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

import pipeline
from pipeline.artifacts import file_digest, fingerprint, fresh_folder, publish
from pipeline.captions.records import empty_split_error
from pipeline.captions.tokens import TOKENS_FILE, CaptionTokens, read_tokens, require_vocabulary
from pipeline.captions.vocabulary import VOCABULARY_FILE, Vocabulary, read_vocabulary
from pipeline.decoder.model_io import (
    ModelConfig,
    TrainingData,
    WarmStart,
    read_history,
    read_model,
    read_refine_history,
    write_history,
    write_model,
)
from pipeline.distributed import SINGLE_PROCESS, Processes
from pipeline.errors import UserError
from pipeline.features.store import INDEX_FILE, FeatureStore
from pipeline.import_graph import code_digest
from pipeline.params import to_plain
from pipeline.training.live_metrics import LiveMetrics
from pipeline.training.loop import Intervals, run_training
from pipeline.training.text_pretraining import JointTrainer, Text, TextPretrainer
from pipeline.training.threads import training_threads
from pipeline.training.trainer import Trainer, TrainParams
from pipeline.training.warm_start import initial_weights, model_digest

logger = logging.getLogger("gridcap")

CHECKPOINT_FILE = "checkpoint.safetensors"
TEXT_CHECKPOINT_FILE = "text_checkpoint.safetensors"
TEXT_LIVE_FOLDER = "text"
"""Folder of the live metrics of pretraining on text, below those of the run."""
MODEL_FOLDER = "model"

T = TypeVar("T", bound=Trainer)


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


@dataclass(frozen=True, kw_only=True)
class TrainInputs:
    """What a training run reads."""

    vocabulary: Vocabulary
    store: FeatureStore
    train: CaptionTokens
    """Captions of the train split."""
    val: CaptionTokens
    """Captions of the validation split."""
    text: CaptionTokens
    """Captions without images."""


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
    """Compute the fingerprint of everything that determines the weights of a run.

    Raises:
        UserError: `params.start_from` is not a model folder.
    """
    start = None
    if params.start_from is not None:
        start = [model_digest(params.start_from), code_digest("pipeline.training.warm_start")]
    parts = fingerprint_parts(replace(params, start_from=None), paths, world_size, "pipeline.training.text_pretraining")
    return fingerprint(start=start, **parts)


def fingerprint_parts(params: object, paths: TrainPaths, world_size: int, module: str) -> dict[str, Any]:
    """Return what determines the weights of a run of `module` with a section of the params, by name."""
    return {
        "params": to_plain(params),
        "tokens": file_digest(paths.tokens / TOKENS_FILE),
        "vocabulary": file_digest(paths.tokens / VOCABULARY_FILE),
        "features": file_digest(paths.features / INDEX_FILE),
        "code": code_digest(module),
        "torch": torch.__version__,
        "processes": world_size,
    }


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
    warm_start: WarmStart | None = None

    text_checkpoint = folder / TEXT_CHECKPOINT_FILE

    def start(inputs: TrainInputs, checkpoint: Path) -> Trainer:
        nonlocal warm_start
        weights = None
        if params.start_from is not None:
            weights, warm_start = initial_weights(params.start_from, params, inputs.vocabulary, inputs.store.spec)
            if processes.is_main and not checkpoint.is_file():
                name = f"{params.start_from}, training run {warm_start.fingerprint}"
                logger.info("train: initial weights of %s: %s", name, warm_start.summary)

        def make(kind: Callable[..., T], checkpoint: Path, **arguments: object) -> T:
            return kind(
                params=params,
                train=inputs.train,
                val=inputs.val,
                store=inputs.store,
                vocabulary=inputs.vocabulary,
                checkpoint=checkpoint,
                device=device,
                processes=processes,
                initial_weights=weights,
                **arguments,
            )

        pretraining = params.text_pretraining if inputs.text.captions else None
        is_pretrained = processes.broadcast(checkpoint.is_file())
        if pretraining is None or (is_pretrained and not pretraining.joint_weight):
            return make(Trainer, checkpoint)
        text = Text.fit(inputs.text, inputs.train, inputs.store, len(inputs.vocabulary), params, processes)
        if not is_pretrained:
            pretrainer = make(TextPretrainer, text_checkpoint, text=text)
            _run(pretrainer, text_checkpoint, intervals, paths.live / TEXT_LIVE_FOLDER)
            weights = pretrainer.eval_model.state_dict()
        return make(JointTrainer, checkpoint, text=text) if pretraining.joint_weight else make(Trainer, checkpoint)

    def write(model: Path, trainer: Trainer, inputs: TrainInputs) -> None:
        text_checkpoint.unlink(missing_ok=True)
        config = replace(_model_config(folder.name, trainer, inputs), warm_start=warm_start)
        write_model(model, trainer.best_weights, trainer.vocabulary, config)
        write_history(model, trainer.progress.history)

    with training_threads(params.batch_size, params.decoder.hidden_size):
        return run_in(folder, Trainer.stage, paths, intervals, processes, start, write)


def run_in(
    folder: Path,
    stage: str,
    paths: TrainPaths,
    intervals: Intervals,
    processes: Processes,
    start: Callable[[TrainInputs, Path], T],
    write: Callable[[Path, T, TrainInputs], None],
) -> Path:
    """Run a trainer to its end in a folder that no other run uses, unless its finished model is there.

    Args:
        folder: Folder of the run.
        stage: Stage of the run.
        paths: Folders to read; `paths.work` is not used.
        intervals: How often to write checkpoints and live metrics.
        processes: The processes that share every batch.
        start: Returns the trainer for some inputs and a checkpoint file.
        write: Writes the finished model to a folder. Rank 0 calls it.

    Returns:
        The finished model folder.

    Raises:
        UserError: An input is missing or damaged, or the loss is not finite.
    """
    model = folder / MODEL_FOLDER
    if processes.broadcast(_is_intact(model, stage) if processes.is_main else False):
        if processes.is_main:
            logger.info("%s: %s is up to date, nothing to do", stage, model)
        return model
    inputs, checkpoint = _read_inputs(paths), folder / CHECKPOINT_FILE
    trainer = start(inputs, checkpoint)
    _run(trainer, checkpoint, intervals, paths.live)
    if processes.is_main:
        with fresh_folder(model) as unfinished:
            write(unfinished, trainer, inputs)
            publish(unfinished, model)
        checkpoint.unlink()
    return model


def _run(trainer: Trainer, checkpoint: Path, intervals: Intervals, live: Path) -> None:
    """Run a trainer to its end, with live metrics in the folder `live`."""
    is_main = trainer.processes.is_main
    if is_main and trainer.is_resumed:
        epoch, batch = trainer.progress.epoch + 1, trainer.progress.batch
        logger.info("%s: resuming from %s: epoch %d, batch %d", trainer.phase, checkpoint, epoch, batch)
    run_training(trainer, intervals, LiveMetrics(live, trainer.global_step) if is_main else None)


def _read_inputs(paths: TrainPaths) -> TrainInputs:
    vocabulary = read_vocabulary(paths.tokens / VOCABULARY_FILE)
    require_vocabulary(paths.tokens / TOKENS_FILE, vocabulary)
    # No step is taken with altered grids. To verify all shards first would delay it by minutes: COCO has 25 GB.
    store = FeatureStore(paths.features, verify_reads=True)
    train_captions, val_captions = (
        read_tokens(paths.tokens / TOKENS_FILE, split, store.skipped_ids) for split in ("train", "val")
    )
    if not len(val_captions.image_id):
        raise empty_split_error(paths.tokens / TOKENS_FILE, "val", "on which every epoch is evaluated")
    text = read_tokens(paths.tokens / TOKENS_FILE, "text")
    return TrainInputs(vocabulary=vocabulary, store=store, train=train_captions, val=val_captions, text=text)


def _model_config(run: str, trainer: Trainer, inputs: TrainInputs) -> ModelConfig:
    params, store = trainer.params, inputs.store
    return ModelConfig(
        fingerprint=run,
        decoder=params.decoder,
        vocabulary_digest=trainer.vocabulary.digest,
        encoder=store.spec,
        encoder_fingerprint=store.fingerprint,
        view=store.views[0],
        data=TrainingData(
            num_images=len(set(inputs.train.image_id.tolist())),
            num_captions=len(inputs.train.image_id),
            num_val_images=len(set(inputs.val.image_id.tolist())),
            num_text_captions=0 if params.text_pretraining is None else len(inputs.text.image_id),
        ),
        epoch=trainer.progress.best_epoch,
        selected_by=params.select_by,
        versions={
            "gridcap": pipeline.__version__,
            **{package: version(package) for package in ("torch", "torchvision")},
        },
    )


def _is_intact(model: Path, stage: str) -> bool:
    """Return whether a finished model can be read; a damaged one is removed."""
    if not model.is_dir():
        return False
    try:
        config = read_model(model).config
        read_history(model, config)
        read_refine_history(model, config)
    except UserError as error:
        logger.warning("%s: the finished model is damaged and is trained again (%s)", stage, error)
        shutil.rmtree(model)
        return False
    return True
