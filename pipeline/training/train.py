"""One training run, from tokens and features to a finished model folder: what stage `train` runs."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import pipeline
from pipeline.artifacts import file_digest, fingerprint, fresh_folder, publish, write_json
from pipeline.captions.tokens import TOKENS_FILE, VOCABULARY_FILE, read_tokens, require_vocabulary
from pipeline.captions.vocabulary import read_vocabulary
from pipeline.decoder.model_io import HISTORY_FILE, ModelConfig, TrainingData, read_model, write_model
from pipeline.distributed import SINGLE_PROCESS, Processes
from pipeline.errors import UserError
from pipeline.features.store import INDEX_FILE, FeatureStore
from pipeline.import_graph import code_digest
from pipeline.params import to_plain
from pipeline.training.trainer import CHECKPOINT_FILE, Intervals, Trainer, TrainParams

MODEL_FOLDER = "model"


@dataclass(frozen=True, kw_only=True)
class TrainInputs:
    """The folders of a training run."""

    tokens: Path
    """Tokens and vocabulary, from `tokenize`."""
    features: Path
    """Feature store, from `encode`."""
    work: Path
    """Root of the work folders; the run's own folder is named by its fingerprint."""
    live: Path
    """DVCLive metrics."""


@contextmanager
def train(
    params: TrainParams,
    inputs: TrainInputs,
    device: torch.device,
    intervals: Intervals,
    processes: Processes = SINGLE_PROCESS,
) -> Iterator[Path]:
    """Train a decoder, or resume its training, and hold the lock of its work folder while the model is published.

    Every process must call this with the same arguments; rank 0 writes.

    Args:
        params: How to build and train the decoder.
        inputs: Folders to read and to work in.
        device: Where to compute.
        intervals: How often to write checkpoints and live metrics.
        processes: The processes that share every batch.

    Yields:
        The finished model folder, inside the run's work folder.

    Raises:
        UserError: An input is missing or damaged, or the loss is not finite.
    """
    name = fingerprint(
        params=to_plain(params),
        tokens=file_digest(inputs.tokens / TOKENS_FILE),
        vocabulary=file_digest(inputs.tokens / VOCABULARY_FILE),
        features=file_digest(inputs.features / INDEX_FILE),
        code=code_digest("pipeline.training.trainer"),
        torch=torch.__version__,
        processes=processes.world_size,
    )
    with processes.work_folder(inputs.work, "train", name) as folder:
        yield train_in(folder, params, inputs, device, intervals, processes)


def train_in(
    folder: Path,
    params: TrainParams,
    inputs: TrainInputs,
    device: torch.device,
    intervals: Intervals,
    processes: Processes = SINGLE_PROCESS,
) -> Path:
    """Train in a folder that belongs to this run alone, as `train` does; returns the finished model folder."""
    tokens, features, live = inputs.tokens, inputs.features, inputs.live
    finished = folder / MODEL_FOLDER
    if processes.broadcast(_is_whole(finished) if processes.is_main else False):
        if processes.is_main:
            print(f"train: nothing to do, {finished} is the finished model of these params and inputs", flush=True)
        return finished
    vocabulary = read_vocabulary(tokens / VOCABULARY_FILE)
    require_vocabulary(tokens / TOKENS_FILE, vocabulary)
    store = FeatureStore(features)
    if processes.is_main:
        store.verify()
    captions, val = (read_tokens(tokens / TOKENS_FILE, split) for split in ("train", "val"))
    trainer = Trainer(
        params=params,
        train=captions,
        val=val,
        store=store,
        vocabulary=vocabulary,
        folder=folder,
        live=live,
        device=device,
        processes=processes,
    )
    trainer.run(intervals)
    if processes.is_main:
        progress = trainer.progress
        config = ModelConfig(
            fingerprint=folder.name,
            decoder=params.decoder,
            vocabulary_digest=vocabulary.digest,
            encoder=store.spec,
            encoder_fingerprint=store.fingerprint,
            view=store.views[0],
            data=TrainingData(
                num_images=len(set(captions.image_id.tolist())),
                num_captions=len(captions.image_id),
                num_val_images=len(set(val.image_id.tolist())),
            ),
            epoch=progress.best_epoch,
            selected_by=params.select_by,
            versions={"gridcap": pipeline.__version__, **{name: version(name) for name in ("torch", "torchvision")}},
        )
        with fresh_folder(finished) as unfinished:
            write_model(unfinished, trainer.best, vocabulary, config)
            write_json(unfinished / HISTORY_FILE, progress.history)
            publish(unfinished, finished)
        (folder / CHECKPOINT_FILE).unlink()
    return finished


def _is_whole(model: Path) -> bool:
    """Whether a finished model is there, and undamaged; a damaged one is removed."""
    if not model.is_dir():
        return False
    try:
        read_model(model)
    except UserError as error:
        print(f"train: the finished model is damaged and is made anew ({error})", flush=True)
        shutil.rmtree(model)
        return False
    return True
