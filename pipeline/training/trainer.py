"""The trainer: optimizer steps, epochs, validation and selection of the best epoch.

`Trainer` learns from the captions of the dataset, `self_critical.SelfCriticalTrainer` from captions that it samples.
This module and its imports determine the weights. `pipeline.training.loop` adds checkpoint intervals, signals, live
metrics and the progress bar; changing those retrains nothing.

Shapes: `B` images, `K` captions per image, `T` words, `P` regions.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.captions.tokens import CaptionTokens, group_references
from pipeline.captions.vocabulary import Vocabulary
from pipeline.cuda_graphs import GraphedFunction
from pipeline.decoder.decoder import Decoder, DecoderParams
from pipeline.decoder.registry import build_decoder
from pipeline.distributed import SINGLE_PROCESS, Processes
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.metrics.cider import is_defined
from pipeline.params import DEPENDENCY, params_section
from pipeline.training.adam import Adam
from pipeline.training.batches import Batch, CaptionBatches, GridSource
from pipeline.training.checkpoint import Progress, TrainingState, load_checkpoint, random_state, save_checkpoint
from pipeline.training.ema import make_ema
from pipeline.training.loss import Loss, count_targets, projected_caption_loss, sum_attention_entropy
from pipeline.training.lr_schedule import LRParams
from pipeline.training.scheduled_sampling import mix_in_predictions
from pipeline.training.validation import NonFiniteLossError, SelectBy, ValidationResult, validate

_MIN_VAL_BATCH_SIZE = 32
"""Minimum images per validation batch: a step of greedy search takes about as long for a few images as for these."""
_STEPS_MULTIPLE = 4
"""Multiple of decoding steps that captions are padded to for CUDA graphs, of which each shape of a batch needs one."""


@params_section
class TextPretrainingParams:
    """Training of the decoder on captions without images."""

    max_epochs: Annotated[int, Field(ge=1, le=100_000)]
    """Epochs on the text before the usual training."""
    joint_weight: Annotated[float, Field(ge=0, le=100)]
    """Weight of the text in the loss of the usual training, in which the captions of images have weight 1; 0 uses the
    text only before it."""
    num_regions: Annotated[int, Field(ge=1, le=10_000)]
    """Pseudo-regions of a caption, at most the regions of a grid."""
    ridge_penalty: Annotated[float, Field(gt=0, le=1e12)]
    """Penalty of the ridge regression that predicts the mean region from the words of a caption."""
    noise: Annotated[float, Field(ge=0, le=100)]
    """Standard deviation of the normal noise added to the pseudo-regions, which are layer-normalized; 0 disables it."""


@params_section
class TrainParams:
    """Architecture and training of the decoder."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Random seed of initialization, batch order and dropout."""
    start_from: Annotated[Path | None, DEPENDENCY]
    """Model folder whose weights are the initial weights, of the same `decoder.kind` and sizes; null draws random
    weights."""
    start_from_grids: Literal["refuse", "adapt"]
    """What to do if `start_from` was trained on features of another encoder: an error (`refuse`), or draw new weights
    for the layers that read grids (`adapt`)."""
    decoder: DecoderParams
    text: Annotated[Path | None, DEPENDENCY]
    """File of captions without images to learn from, or folder of such files: one caption a line, CSV with the header
    `image,caption` or `caption`, or COCO JSON; null for none. `tokenize` reads the file."""
    text_pretraining: TextPretrainingParams | None
    """Training on the text; null disables it, and the text only adds words to the vocabulary."""
    batch_size: Annotated[int, Field(ge=1, le=4096)]
    """Images per batch, each with all of its captions."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=10_000)]
    """Batches per optimizer step; increase it if memory is short."""
    random_views: bool
    """Sample one of the stored views (`encode.views`) of each image every epoch; false uses the first view."""
    max_epochs: Annotated[int, Field(ge=1, le=100_000)]
    """Maximum number of epochs."""
    optimizer: Literal["adam", "adamw"]
    """Optimizer: Adam, or AdamW, which decouples weight decay from the gradients."""
    weight_decay: Annotated[float, Field(ge=0, le=100)]
    """Weight decay coefficient; 0 disables it."""
    lr: LRParams
    max_grad_norm: Annotated[float, Field(gt=0)]
    """Maximum L2 norm of the gradients; larger gradients are scaled down."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    """Label smoothing: probability mass spread evenly over the vocabulary; 0 disables it."""
    scheduled_sampling: Annotated[float, Field(ge=0, le=1)]
    """Scheduled sampling probability at the last epoch, increasing linearly from 0; 0 disables it."""
    doubly_stochastic_weight: Annotated[float, Field(ge=0, le=1000)]
    """Weight of doubly stochastic attention regularization, a mean over captions and regions; 0 disables it."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    """EMA decay of the weights, with warm-up; 0 disables it."""
    precision: Literal["float32", "bfloat16"]
    """Precision of matrix products (autocast); weights and loss are always float32."""
    compile: bool
    """Compile the attention scores with `torch.compile`; needs g++ and adds some seconds at the start. On one GPU, also
    replay the gradients of a batch as CUDA graphs."""
    select_by: SelectBy
    """Metric of greedy validation captions that selects the best epoch and stops training early; `last` keeps the last
    epoch."""
    patience: Annotated[int, Field(ge=1, le=100_000)]
    """Epochs without improvement before early stopping."""
    max_length: Annotated[int, Field(ge=1, le=1000)]
    """Maximum words of a validation caption."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Captions of one batch that the decoder learns from, on its device."""

    tokens: Tensor
    """Token ids [B, K, T + 1], padded with `<pad>`."""
    weights: Tensor | None = None
    """Factor of the cross-entropy of each caption [B, K]; None for 1."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Metrics of one optimizer step, over all processes."""

    step: int
    """Step in the whole run, from 1."""
    loss: float
    """Mean cross-entropy, in nats per word."""
    learning_rate: float
    gradient_norm: float
    """L2 norm of the gradients before clipping."""
    attention_entropy: float | None
    """Mean entropy of the attention weights, in nats; None if it was not computed."""
    num_batches: int
    num_captions: int
    samples: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the sampled captions by name; empty if the captions are those of the dataset."""
    data_wait: float = 0.0
    """Seconds that this process waited for the step's batches."""


@dataclass(frozen=True, kw_only=True)
class _PendingStep:
    """An optimizer step whose sums a GPU may still be computing."""

    epoch: int
    step: int
    learning_rate: float
    num_batches: int
    has_entropy: bool
    data_wait: float
    sums: Tensor
    """Over all processes, float64 [6 + S]: cross-entropy, loss, attention entropy, words, captions, L2 norm of the
    gradients, and the sums of `Trainer._select_targets`."""


class Trainer:
    """A training run. Creating it resumes from the checkpoint file if that exists."""

    stage = "train"
    """Stage and section of the params, which name the run in errors and metrics."""

    _warms_up_ema = True
    """Whether the EMA forgets the initial weights, as `make_ema` describes."""

    def __init__(
        self,
        *,
        params: TrainParams,
        train: CaptionTokens,
        val: CaptionTokens,
        store: FeatureStore,
        vocabulary: Vocabulary,
        checkpoint: Path,
        device: torch.device,
        processes: Processes = SINGLE_PROCESS,
        initial_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Build the decoder, the optimizer and the EMA.

        Args:
            params: Architecture and training of the decoder.
            train: Captions of the train split.
            val: Captions of the validation split.
            store: Grids of the images of both splits.
            vocabulary: Vocabulary of the captions.
            checkpoint: Checkpoint file, read if it exists and written by `save_checkpoint`.
            device: Device to train on.
            processes: The processes that share every batch.
            initial_weights: State dict of the decoder to start from; None draws random weights.

        Raises:
            UserError: The checkpoint is damaged, or the epoch is selected by a metric that is not defined.
        """
        self.params = params
        self.vocabulary = vocabulary
        self._checkpoint = checkpoint
        self._device = device
        self.processes = processes
        self._replays = params.compile and device.type == "cuda" and processes.world_size == 1
        """Whether gradients are replayed as CUDA graphs, which DistributedDataParallel does not support here."""
        self._train_batches = self._make_train_batches(train, store, params.batch_size, params.random_views)
        self._val_batches = CaptionBatches(val, store, max(params.batch_size, _MIN_VAL_BATCH_SIZE), device=device)
        self._val_references = group_references(val)
        if params.select_by == "cider" and not is_defined(list(self._val_references.values())):
            raise UserError(
                f"{self.stage}.select_by: CIDEr-D is not defined for the val split, which has one image or the same"
                " references for all images. Use bleu4 or last."
            )
        torch.manual_seed(params.seed)
        self.decoder = build_decoder(params.decoder, store.spec.grid, store.channels, len(vocabulary)).to(device)
        if initial_weights is not None:
            self.decoder.load_state_dict(initial_weights)
        self.decoder.compiled = params.compile
        decoupled = params.optimizer == "adamw"
        self._state = TrainingState(
            decoder=self.decoder,
            optimizer=Adam(self.decoder.parameters(), params.weight_decay, decoupled_weight_decay=decoupled),
            ema=make_ema(self.decoder, params.ema_decay, self._warms_up_ema),
        )
        # Every rank has the same initial weights. From here on, random states differ, and so does dropout.
        torch.manual_seed(params.seed + processes.rank)
        self.is_resumed = processes.broadcast(checkpoint.is_file())
        if self.is_resumed:
            load_checkpoint(checkpoint, self._state, processes.rank)
        self._model: nn.Module = DistributedDataParallel(self.decoder) if processes.world_size > 1 else self.decoder
        self._replay = GraphedFunction(self._backward) if self._replays else None
        self._pending: list[_PendingStep] = []
        self._metrics: list[StepMetrics] = []

    def _make_train_batches(
        self, captions: CaptionTokens, store: GridSource, batch_size: int, random_views: bool
    ) -> CaptionBatches:
        return CaptionBatches(
            captions,
            store,
            batch_size,
            random_views,
            self._device,
            steps_multiple=_STEPS_MULTIPLE if self._replays else 1,
        )

    @property
    def phase(self) -> str:
        """Name of the run in messages."""
        return self.stage

    @property
    def progress(self) -> Progress:
        """Position of the run, and its metrics up to the last call of `read_metrics`."""
        return self._state.progress

    @property
    def best_weights(self) -> dict[str, Tensor]:
        """State dict of the best epoch."""
        return self._state.best_weights

    @property
    def eval_model(self) -> Decoder:
        """The decoder that is validated and published: the EMA if there is one."""
        return self.decoder if self._state.ema is None else cast(Decoder, self._state.ema.module)

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches per epoch."""
        return len(self._train_batches)

    @property
    def global_step(self) -> int:
        """Number of optimizer steps taken in the whole run."""
        steps_in_epoch = -(-self.progress.batch // self.params.gradient_accumulation_steps)
        return self.progress.epoch * self._steps_per_epoch + steps_in_epoch

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done or early stopping applies."""
        epochs_without_improvement = self.progress.epoch - self.progress.best_epoch
        return self.progress.epoch >= self.params.max_epochs or epochs_without_improvement >= self.params.patience

    @property
    def _steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.params.gradient_accumulation_steps)

    def train_epoch(self, log_entropy: Callable[[int], bool]) -> Iterator[int]:
        """Take the remaining optimizer steps of the current epoch. Between two steps, a checkpoint can be saved.

        Args:
            log_entropy: Whether to compute the attention entropy of a step, counted from 1 in the whole run.

        Yields:
            The number of each step in the whole run, from 1. `read_metrics` returns its metrics.
        """
        batches = self._train_batches.shuffled(
            self.params.seed,
            self.progress.epoch,
            start_batch=self.progress.batch,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )
        while True:
            start = time.monotonic()
            step_batches = list(islice(batches, self.params.gradient_accumulation_steps))
            data_wait = time.monotonic() - start
            if not step_batches:
                return
            self.train_step(step_batches, log_entropy(self.global_step + 1), data_wait)
            yield self.global_step

    def train_step(self, batches: Sequence[Batch], log_entropy: bool = False, data_wait: float = 0.0) -> None:
        """Take one optimizer step without waiting for a GPU, unless captions are sampled.

        Args:
            batches: This process's share of the batches of the step.
            log_entropy: Whether to compute the attention entropy.
            data_wait: Seconds that this process waited for the batches.
        """
        optimizer, progress = self._state.optimizer, self.progress
        step = self.global_step + 1
        lr = self.params.lr.lr_at(step - 1, self._steps_per_epoch, self.params.max_epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        targets, sample_sums = self._select_targets(batches)
        counts = self._count([captions.tokens for captions in targets])
        optimizer.zero_grad(set_to_none=not self._replays)  # A graph adds to gradients that stay in place.
        sums = self.processes.sum(self._accumulate_gradients(batches, targets, counts, log_entropy))
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), self.params.max_grad_norm)
        optimizer.step()
        if self._state.ema is not None:
            self._state.ema.update_parameters(self.decoder)
        self._pending.append(
            _PendingStep(
                epoch=progress.epoch + 1,
                step=step,
                learning_rate=lr,
                num_batches=len(batches),
                has_entropy=log_entropy,
                data_wait=data_wait,
                sums=torch.cat([sums, counts, gradient_norm.double().unsqueeze(0), sample_sums]),
            )
        )
        progress.batch += len(batches)

    def read_metrics(self) -> list[StepMetrics]:
        """Return the metrics of the steps since the last call, and add them to the progress. This waits for a GPU.

        Raises:
            UserError: The loss or the gradient norm of a step is not finite.
        """
        self._read_pending()
        metrics, self._metrics = self._metrics, []
        return metrics

    def _read_pending(self) -> None:
        """Read the sums of the pending steps, all at once, and add them to the progress in the order of the steps.

        Raises:
            UserError: The loss or the gradient norm of a step is not finite.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        for step, sums in zip(pending, torch.stack([step.sums for step in pending]).tolist(), strict=True):
            cross_entropy, loss, entropy, num_words, num_captions, gradient_norm, *sample_sums = sums
            for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
                if not math.isfinite(value):
                    raise self._divergence(f"the {name} is {value}", step.epoch, step.step, step.learning_rate)
            self.progress.loss_sum += cross_entropy
            self.progress.num_words += int(num_words)
            self._metrics.append(
                StepMetrics(
                    step=step.step,
                    loss=cross_entropy / num_words,
                    learning_rate=step.learning_rate,
                    gradient_norm=gradient_norm,
                    attention_entropy=entropy / num_words if step.has_entropy else None,
                    num_batches=step.num_batches,
                    num_captions=int(num_captions),
                    samples=self._record_samples(sample_sums),
                    data_wait=step.data_wait,
                )
            )

    def _select_targets(self, batches: Sequence[Batch]) -> tuple[list[Targets], Tensor]:
        """Return the captions of each batch to learn from, and sums for `_record_samples`, float64 [S]."""
        no_sums = torch.zeros(0, dtype=torch.float64, device=self._device)
        return [Targets(tokens=batch.tokens) for batch in batches], no_sums

    def _record_samples(self, sums: Sequence[float]) -> Mapping[str, float]:
        """Add the sums that `_select_targets` returned to the progress, and return `StepMetrics.samples`."""
        return {}

    def _count(self, tokens: Sequence[Tensor]) -> Tensor:
        """Count words and captions over the batches [B, K, T + 1] of a step and over all processes [2]."""
        counts = torch.stack([count_targets(ids[:, :, 1:]) for ids in tokens]).sum(dim=0)
        return self.processes.sum(counts.double())

    def _accumulate_gradients(
        self, batches: Sequence[Batch], targets: Sequence[Targets], counts: Tensor, log_entropy: bool
    ) -> Tensor:
        """Compute the gradients of an optimizer step, summed over its batches.

        Args:
            batches: This process's share of the batches of the step.
            targets: Captions of each batch to learn from.
            counts: Number of words and captions of the step, over all processes [2].
            log_entropy: Whether to compute the attention entropy.

        Returns:
            Sums over this process's batches [3]: cross-entropy, loss, attention entropy.
        """
        self.decoder.train()
        backward = self._replay or partial(self._backward, with_entropy=log_entropy)
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        for index, (batch, captions) in enumerate(zip(batches, targets, strict=True)):
            inputs = self._sample_inputs(batch.grids, captions.tokens[:, :, :-1])  # [B, K, T]
            tensors = [batch.grids, inputs, captions.tokens[:, :, 1:], counts]
            if captions.weights is not None:
                tensors.append(captions.weights)
            with self._grad_sync(is_last=index == len(batches) - 1):
                sums += backward(*tensors)
        return sums

    def _backward(
        self,
        grids: Tensor,
        inputs: Tensor,
        ids: Tensor,
        counts: Tensor,
        weights: Tensor | None = None,
        with_entropy: bool = True,
    ) -> Tensor:
        """Add the gradients of one batch to those of the weights.

        Args:
            grids: Grids [B, P, C].
            inputs: Ids to read [B, K, T].
            ids: Ids of the next words [B, K, T].
            counts: Number of words and captions of the step, over all processes [2].
            weights: `Targets.weights`.
            with_entropy: Whether to compute the attention entropy, which is 0 otherwise.

        Returns:
            Sums of cross-entropy, loss and attention entropy [3], float64.
        """
        with self._autocast():
            outputs, alpha = self._model(grids, inputs, with_logits=False)  # [B, K, T, O], [B, K, T, P]
            loss = self._loss(outputs, alpha, ids, weights)
        total = loss.total(counts, self.params.doubly_stochastic_weight)
        # DistributedDataParallel averages gradients over ranks; the gradient of the step is their sum.
        (total * self.processes.world_size).backward()  # type: ignore[no-untyped-call]
        entropy = sum_attention_entropy(alpha.detach(), ids) if with_entropy else torch.zeros_like(total)
        return torch.stack([sum_.detach().double() for sum_ in (loss.cross_entropy, total, entropy)])

    def _loss(self, outputs: Tensor, alpha: Tensor, ids: Tensor, weights: Tensor | None) -> Loss:
        """Compute the loss of inputs of the output layer, alpha [B, K, T, P], target ids and `Targets.weights`."""
        smoothing = self.params.label_smoothing
        return projected_caption_loss(outputs, self.decoder.output_proj, alpha, ids, smoothing, weights)

    def _grad_sync(self, is_last: bool) -> AbstractContextManager[None]:
        """Synchronize the gradients of all processes only in the last backward pass of a step."""
        if isinstance(self._model, DistributedDataParallel) and not is_last:
            return self._model.no_sync()
        return nullcontext()

    def _autocast(self) -> torch.autocast:
        # A graph must not keep casts of the weights, which the optimizer changes.
        enabled = self.params.precision == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled, cache_enabled=not self._replays)

    @torch.no_grad()
    def _sample_inputs(self, grids: Tensor, tokens: Tensor) -> Tensor:
        """Return the ids [B, K, T] to read instead of `tokens` under scheduled sampling."""
        num_steps = self.params.max_epochs * self._steps_per_epoch
        sampling_probability = self.params.scheduled_sampling * self.global_step / num_steps
        if not sampling_probability or tokens.shape[2] == 1:
            return tokens
        with self._autocast():
            logits, _ = self.decoder(grids, tokens[:, :, :-1])  # [B, K, T - 1, V]
        return mix_in_predictions(tokens, logits, sampling_probability)

    def end_epoch(self) -> ValidationResult | None:
        """Validate, update the best weights and start the next epoch.

        Returns:
            The result on rank 0, None on all other ranks. On every rank, its metrics are in the last row of
            `progress.history`.

        Raises:
            UserError: The loss or the gradient norm of a step, or the validation loss is not finite.
        """
        self._read_pending()
        train_metrics = self._train_metrics()
        self._state.progress = self.progress.next_epoch()
        return self._record_epoch(train_metrics)

    def _record_epoch(self, train_metrics: Mapping[str, float | None]) -> ValidationResult | None:
        """Validate, add a row to the history, and update the best weights. As `end_epoch`."""
        progress = self.progress
        result = None
        if self.processes.is_main:
            result = self._validate()
            progress.history.append({"epoch": progress.epoch, **train_metrics, **result.metrics})
            self._update_best(result.selection_score(self.params.select_by, progress.epoch))
        self._state.progress = self.processes.broadcast(progress)
        return result

    def _train_metrics(self) -> dict[str, float | None]:
        """Return the metrics of the epoch so far on its train batches, for the history."""
        return {"train_loss": self.progress.train_loss}

    def _update_best(self, score: float) -> None:
        """Keep the weights of the completed epoch if its selection score is the highest so far."""
        progress = self.progress
        if progress.best_score is None or score > progress.best_score:
            progress.best_score, progress.best_epoch = score, progress.epoch
            weights = self.eval_model.state_dict()
            self._state.best_weights = {name: tensor.detach().clone() for name, tensor in weights.items()}

    def _validate(self) -> ValidationResult:
        try:
            return validate(
                self.eval_model.eval(),
                self._val_batches,
                self._val_references,
                self.vocabulary,
                self.params.max_length,
            )
        except NonFiniteLossError as error:
            lr = self._state.optimizer.param_groups[0]["lr"]
            raise self._divergence(str(error), self.progress.epoch, self.global_step, lr) from error

    def save_checkpoint(self) -> None:
        """Write the checkpoint file. Every process must call this.

        Raises:
            UserError: The loss or the gradient norm of a step is not finite, or a weight.
        """
        self._read_pending()
        largest = torch.nn.utils.get_total_norm(self.decoder.parameters(), math.inf).item()
        if not math.isfinite(largest):
            lr = self._state.optimizer.param_groups[0]["lr"]
            raise self._divergence(f"the largest weight is {largest}", self.progress.epoch + 1, self.global_step, lr)
        random_states = self.processes.gather(random_state(self._device))
        if self.processes.is_main:
            save_checkpoint(self._checkpoint, self._state, random_states)

    def _divergence(self, problem: str, epoch: int, step: int, lr: float) -> UserError:
        checkpoint = (
            f"The last checkpoint is {self._checkpoint}." if self._checkpoint.is_file() else "No checkpoint was saved."
        )
        return UserError(
            f"{self.phase}: epoch {epoch}, step {step}: {problem} at learning rate {lr:.3g}. Lower"
            f" {self.stage}.lr.peak or {self.stage}.max_grad_norm in params.yaml. {checkpoint}"
        )
