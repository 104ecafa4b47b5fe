"""Self-critical training of a trained model in its work folder: from `data/trained` to a finished model folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.artifacts import file_digest, fingerprint
from pipeline.captions.tokens import TOKENS_FILE, require_vocabulary
from pipeline.decoder.model_io import (
    WEIGHTS_FILE,
    ModelConfig,
    Refinement,
    read_history,
    read_model,
    record_provenance,
    write_history,
    write_model,
    write_refine_history,
)
from pipeline.distributed import SINGLE_PROCESS, Processes
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.training.loop import Intervals
from pipeline.training.self_critical import RefineParams, SelfCriticalTrainer
from pipeline.training.threads import training_threads
from pipeline.training.train import TrainInputs, TrainPaths, fingerprint_parts, run_in


@contextmanager
def refine(
    trained: Path,
    params: RefineParams,
    paths: TrainPaths,
    device: torch.device,
    intervals: Intervals,
    processes: Processes = SINGLE_PROCESS,
) -> Iterator[Path]:
    """Refine a trained model or resume its refinement.

    The lock of the work folder is held while the caller publishes the model. Every process must call this with the same
    arguments; rank 0 writes.

    Args:
        trained: Model folder, from `train`.
        params: Self-critical training.
        paths: Folders to read and to work in.
        device: Device to train on.
        intervals: How often to write checkpoints and live metrics.
        processes: The processes that share every batch.

    Yields:
        The finished model folder, inside the run's work folder; `trained` itself if `params.max_epochs` is 0.

    Raises:
        UserError: An input is missing or damaged, the inputs do not belong together, or the loss is not finite.
    """
    config = read_model(trained).config
    read_history(trained, config)
    if params.max_epochs == 0:
        yield trained
        return
    run = run_fingerprint(trained, config, params, paths, processes.world_size)
    with processes.work_folder(paths.work, SelfCriticalTrainer.stage, run) as folder:
        model = refine_in(folder, trained, params, paths, device, intervals, processes)
        if processes.is_main:
            # The fingerprint does not cover it.
            record_provenance(model, config.dataset, config.encoder_weights)
        yield model


def run_fingerprint(
    trained: Path, config: ModelConfig, params: RefineParams, paths: TrainPaths, world_size: int
) -> str:
    """Compute the fingerprint of everything that determines the weights of a run."""
    return fingerprint(
        trained=config.fingerprint,
        weights=file_digest(trained / WEIGHTS_FILE),
        **fingerprint_parts(params, paths, world_size, "pipeline.training.self_critical"),
    )


def refine_in(
    folder: Path,
    trained: Path,
    params: RefineParams,
    paths: TrainPaths,
    device: torch.device,
    intervals: Intervals,
    processes: Processes = SINGLE_PROCESS,
) -> Path:
    """Refine a trained model in a folder that no other run uses.

    Args:
        folder: Folder of the run. Its name is recorded as the fingerprint of the model.
        trained: As for `refine`.
        params: As for `refine`; `max_epochs` is at least 1.
        paths: As for `refine`; `paths.work` is not used.
        device: As for `refine`.
        intervals: As for `refine`.
        processes: As for `refine`.

    Returns:
        The finished model folder.

    Raises:
        UserError: As for `refine`.
    """
    model = read_model(trained)
    history = read_history(trained, model.config)

    def start(inputs: TrainInputs, checkpoint: Path) -> SelfCriticalTrainer:
        require_vocabulary(paths.tokens / TOKENS_FILE, model.vocabulary)
        _require_features(trained, model.config, inputs.store)
        return SelfCriticalTrainer(
            params=params,
            model=model,
            train=inputs.train,
            val=inputs.val,
            store=inputs.store,
            checkpoint=checkpoint,
            device=device,
            processes=processes,
        )

    def write(target: Path, trainer: SelfCriticalTrainer, _: TrainInputs) -> None:
        refinement = Refinement(
            trained_fingerprint=model.config.fingerprint,
            epoch=trainer.progress.best_epoch,
            selected_by=params.select_by,
        )
        config = replace(model.config, fingerprint=folder.name, refinement=refinement)
        write_model(target, trainer.best_weights, model.vocabulary, config)
        write_history(target, history)
        write_refine_history(target, trainer.progress.history)

    with training_threads(params.batch_size, model.config.decoder.hidden_size):
        return run_in(folder, SelfCriticalTrainer.stage, paths, intervals, processes, start, write)


def _require_features(trained: Path, config: ModelConfig, store: FeatureStore) -> None:
    """Raise an error if a model was trained on the features of another encoder or view."""
    expected, actual = (config.encoder_fingerprint, config.view), (store.fingerprint, store.views[0])
    if actual != expected:
        raise UserError(
            f"{trained}: was trained on features {expected[0]}, view {expected[1]}, but the features are {actual[0]},"
            f" view {actual[1]}. Run `dvc repro train`."
        )
