"""The training loop: runs a trainer to its end, with checkpoints, signals, live metrics and a progress bar.

Nothing here affects the weights.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tqdm import tqdm

from pipeline.captions.languages import join_words
from pipeline.training.checkpoint_timer import CheckpointTimer
from pipeline.training.interrupts import Interrupt, defer_signals
from pipeline.training.live_metrics import LiveMetrics
from pipeline.training.throughput import Throughput
from pipeline.training.trainer import StepMetrics, Trainer
from pipeline.training.validation import ValidationResult

logger = logging.getLogger("gridcap")

_REFRESH_STEPS, _REFRESH_SECONDS = 100, 0.5
"""Maximum steps and seconds between updates of the progress bar, which wait for a GPU."""

_LOGGED_CAPTIONS = 3
"""Number of validation captions that are logged after each epoch."""


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """How often a run writes checkpoints and live metrics. Does not affect the weights."""

    checkpoint_steps: int
    """Maximum optimizer steps between checkpoints."""
    checkpoint_seconds: float
    """Maximum seconds between checkpoints."""
    live_steps: int
    """Optimizer steps between rows of live metrics."""

    def is_live(self, step: int) -> bool:
        """Whether the live metrics have a row for a step, counted from 1."""
        return step == 1 or step % self.live_steps == 0


def run_training(trainer: Trainer, intervals: Intervals, live: LiveMetrics | None) -> None:
    """Train to the end, with a checkpoint after each epoch and at `intervals`.

    SIGTERM and SIGINT write a checkpoint before they end the process.

    Args:
        trainer: The run, new or resumed.
        intervals: How often to write checkpoints and live metrics.
        live: Writer of live metrics; None on all ranks but 0.

    Raises:
        UserError: The loss is not finite.
    """
    with defer_signals() as interrupt:
        while not trainer.is_finished:
            _train_epoch(trainer, intervals, live, interrupt)
            validation = trainer.end_epoch()
            if validation is not None:
                _report_epoch(trainer, validation, live)
            trainer.save_checkpoint()


def _train_epoch(trainer: Trainer, intervals: Intervals, live: LiveMetrics | None, interrupt: Interrupt) -> None:
    timer = CheckpointTimer(intervals.checkpoint_steps, intervals.checkpoint_seconds)
    refresh = CheckpointTimer(_REFRESH_STEPS, _REFRESH_SECONDS)
    throughput = Throughput()
    with _progress_bar(trainer) as bar:

        def report() -> None:
            refresh.restart()
            for metrics in trainer.read_metrics():
                throughput.update(metrics.num_captions, metrics.data_wait)
                bar.update(metrics.num_batches)
                if live is not None and intervals.is_live(metrics.step):
                    live.log(metrics.step, _live_row(trainer.stage, metrics, throughput.rates()))
                rate = throughput.rates()["captions_per_second"]
                bar.set_postfix_str(f"loss {trainer.progress.train_loss:.3f}, {rate:.0f} captions/s", refresh=False)

        for step in trainer.train_epoch(intervals.is_live):
            # All processes read the same steps, so that all of them find a loss that is not finite.
            save, show = trainer.processes.broadcast((timer.step() or interrupt.requested, refresh.step()))
            if save or show or intervals.is_live(step):
                report()
            if save:
                trainer.save_checkpoint()
                timer.restart()
                interrupt.exit_if_requested(trainer.processes)
        report()


def _progress_bar(trainer: Trainer) -> "tqdm[Any]":
    return tqdm(
        total=trainer.batches_per_epoch,
        initial=trainer.progress.batch,
        desc=f"{trainer.phase}: epoch {trainer.progress.epoch + 1} of {trainer.params.max_epochs}",
        unit="batch",
        disable=None if trainer.processes.is_main else True,
    )


def _live_row(stage: str, metrics: StepMetrics, rates: Mapping[str, float]) -> dict[str, float]:
    row = {"loss": metrics.loss, "learning_rate": metrics.learning_rate, "gradient_norm": metrics.gradient_norm}
    row |= metrics.samples
    if metrics.attention_entropy is not None:
        row["attention_entropy"] = metrics.attention_entropy
    return {f"{stage}/{name}": value for name, value in (row | dict(rates)).items()}


def _report_epoch(trainer: Trainer, validation: ValidationResult, live: LiveMetrics | None) -> None:
    """Log some captions and the metrics of the completed epoch."""
    for image_id, words in islice(validation.captions.items(), _LOGGED_CAPTIONS):
        logger.info("  image %d: %s", image_id, join_words(words, trainer.vocabulary.language))
    row = {name: value for name, value in trainer.progress.history[-1].items() if value is not None}
    logger.info("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    if live is not None:
        live.log(trainer.global_step, {name: value for name, value in row.items() if name != "epoch"})
