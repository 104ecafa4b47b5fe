"""Training the decoder on cached grids: resumable to the bit, selected by captions it generates freely.

Shapes: `B` images, `K` captions an image, `T` words, `P` regions.
"""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from pipeline.captions.tokens import (
    CaptionTokens,
    references,
)
from pipeline.captions.vocabulary import PAD, START, Vocabulary
from pipeline.decoder.soft_attention import DecoderParams, SoftAttentionDecoder
from pipeline.distributed import SINGLE_PROCESS, Processes
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.generation.ensemble import caption_grids
from pipeline.generation.search import SearchParams
from pipeline.params import params_section
from pipeline.training.batches import Batch, CaptionBatches
from pipeline.training.checkpoint import Progress, load_checkpoint, random_state, save_checkpoint
from pipeline.training.live_metrics import LiveMetrics
from pipeline.training.loss import caption_loss
from pipeline.training.lr_schedule import LRParams
from pipeline.training.teacher_forcing import TeacherForcedResult, evaluate_batch, merge_results

CHECKPOINT_FILE = "checkpoint.safetensors"
_SAMPLES = 3
"""Validation images whose captions are shown after each epoch."""


@params_section
class TrainParams:
    """How the decoder is built and trained."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Fixes the first weights, the order of batches and dropout."""
    decoder: DecoderParams
    batch_size: Annotated[int, Field(ge=1)]
    """Images that are read together, with all their captions."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)]
    """Batches whose gradients make one step of the optimizer: more, where memory is short."""
    random_views: bool
    """Whether each epoch shows a random one of the stored views of an image (`encode.views`), or all the first."""
    max_epochs: Annotated[int, Field(ge=1)]
    """Times at most that every train image is seen."""
    optimizer: Literal["adam", "adamw"]
    """AdamW takes the weight decay off the weights, Adam adds it to their gradients."""
    weight_decay: Annotated[float, Field(ge=0)]
    """Pull of the weights towards 0, in learning rates."""
    lr: LRParams
    max_grad_norm: Annotated[float, Field(gt=0)]
    """Gradients with a larger Euclidean norm are scaled down to it."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    """Share of a word's target that is given to all words alike."""
    scheduled_sampling: Annotated[float, Field(ge=0, le=1)]
    """Share of the words read that the decoder itself predicts, by the last epoch; it rises from 0."""
    doubly_stochastic_weight: Annotated[float, Field(ge=0)]
    """Weight of the doubly stochastic term: a mean over captions and regions, in units of the loss."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    """Weights are averaged over steps, each earlier step counting for this times as much, and for less among the first
    steps of a run; 0 averages nothing."""
    precision: Literal["float32", "bfloat16"]
    """Of the products of matrices; weights, sums over words and the loss are float32 in either."""
    compile: bool
    """Whether PyTorch compiles the comparison of states with regions: faster after a start of some seconds."""
    select_by: Literal["bleu4", "cider", "last"]
    """Score of greedy validation captions that chooses the epoch to keep and stops training; `last` keeps the last
    epoch, since which of them scores best on few validation images is luck."""
    patience: Annotated[int, Field(ge=1)]
    """Epochs without a better score after which training stops."""
    max_length: Annotated[int, Field(ge=1)]
    """Words at which a validation caption is cut off."""


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """When a run writes something down; none of it changes what it computes."""

    checkpoint_steps: int
    """Steps after which a checkpoint is written at the latest."""
    checkpoint_seconds: float
    """Seconds after which one is."""
    live_steps: int
    """Steps from one row of live metrics to the next."""


class Trainer:
    """One training run in its work folder. Making it takes the run up from the folder's checkpoint, if one is there."""

    def __init__(
        self,
        params: TrainParams,
        train: CaptionTokens,
        val: CaptionTokens,
        store: FeatureStore,
        vocabulary: Vocabulary,
        folder: Path,
        live: Path,
        device: torch.device,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self._params = params
        self._vocabulary = vocabulary
        self._device = device
        self._processes = processes
        self._train = CaptionBatches(train, store, params.batch_size, params.random_views)
        self._val = CaptionBatches(val, store, params.batch_size)
        self._references = {
            image_id: [" ".join(words) for words in captions] for image_id, captions in references(val).items()
        }
        self._checkpoint = folder / CHECKPOINT_FILE
        torch.manual_seed(params.seed)
        self.decoder = SoftAttentionDecoder(params.decoder, store.spec.grid, store.channels, len(vocabulary)).to(device)
        self.decoder.compiled = params.compile
        kind = torch.optim.AdamW if params.optimizer == "adamw" else torch.optim.Adam
        self._optimizer = kind(self.decoder.parameters(), weight_decay=params.weight_decay, fused=True)
        self._average = (
            AveragedModel(self.decoder, multi_avg_fn=partial(_average, params.ema_decay)) if params.ema_decay else None
        )
        # Each rank has a random generator of its own from here on: their shares of a batch drop different numbers.
        torch.manual_seed(params.seed + processes.rank)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        if processes.broadcast(self._checkpoint.is_file()):
            self.progress, self.best = load_checkpoint(
                self._checkpoint, self.decoder, self._optimizer, self._average, processes.rank
            )
            if processes.is_main:
                print(
                    f"train: goes on from {self._checkpoint}: "
                    f"{self.progress.epoch} epochs and {self.progress.batch} batches are done",
                    flush=True,
                )
        self._model: nn.Module = DistributedDataParallel(self.decoder) if processes.world_size > 1 else self.decoder
        self._live = LiveMetrics(live, self._steps_done) if processes.is_main else None

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self._train) // self._params.gradient_accumulation_steps)

    @property
    def _steps_done(self) -> int:
        return self.progress.epoch * self._steps_per_epoch + -(
            -self.progress.batch // self._params.gradient_accumulation_steps
        )

    def run(self, intervals: Intervals) -> None:
        """Train to the end, writing a checkpoint each epoch and as often as `rhythm` says.

        SIGTERM and SIGINT write a checkpoint before they end the process. Raises `UserError` where the loss is not
        finite.
        """
        with _interruptible() as interruption:
            while not self._finished():
                self._run_epoch(intervals, interruption)

    def _finished(self) -> bool:
        stale = self.progress.epoch - self.progress.best_epoch
        return self.progress.epoch >= self._params.max_epochs or stale >= self._params.patience

    def _run_epoch(self, intervals: Intervals, interruption: "_Interruption") -> None:
        progress = self.progress
        batches = self._train.shuffled(
            self._params.seed,
            progress.epoch,
            first=progress.batch,
            share=(self._processes.rank, self._processes.world_size),
        )
        saved, steps = time.monotonic(), 0
        began, waited, captions = saved, 0.0, 0
        with tqdm(
            total=len(self._train),
            initial=progress.batch,
            desc=f"train, epoch {progress.epoch + 1} of {self._params.max_epochs}",
            unit="batch",
            disable=None if self._processes.is_main else True,
        ) as bar:
            while True:
                asked = time.monotonic()
                group = list(islice(batches, self._params.gradient_accumulation_steps))
                waited += time.monotonic() - asked
                if not group:
                    break
                number = self._steps_done + 1
                shown = number == 1 or number % intervals.live_steps == 0
                row = self._step(group, shown)
                progress.batch += len(group)
                steps += 1
                captions += int(row.pop("captions"))
                elapsed = time.monotonic() - began
                row["captions_a_second"], row["share_of_time_waiting"] = captions / elapsed, waited / elapsed
                bar.set_postfix_str(
                    f"loss {progress.loss_sum / progress.words:.3f}, {row['captions_a_second']:.0f} captions/s",
                    refresh=False,
                )
                bar.update(len(group))
                if self._live and shown:
                    self._live.log(number, {f"train/{name}": value for name, value in row.items()})
                due = steps % intervals.checkpoint_steps == 0 or time.monotonic() - saved > intervals.checkpoint_seconds
                if self._processes.broadcast(due or interruption.signal is not None):
                    self._save()
                    saved = time.monotonic()
                    interruption.exit_if_requested(self._processes)
        self._end_epoch()

    def _step(self, batches: Sequence[Batch], shown: bool) -> dict[str, float]:
        """Take one step of the optimizer; returns its metrics, with the entropy of attention where they are `shown`.

        `batches` are this rank's share of the step.
        """
        self.decoder.train()
        rate = self._params.lr.at(self._steps_done, self._steps_per_epoch, self._params.max_epochs)
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = rate
        tokens = [batch.tokens.to(self._device) for batch in batches]
        wanted = [ids[:, :, 1:] != PAD for ids in tokens]
        asked = [torch.stack([words.sum(), words.any(dim=2).sum()]) for words in wanted]
        counts = self._processes.sum(torch.stack(asked).sum(dim=0).double())
        self._optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        for number, (batch, ids) in enumerate(zip(batches, tokens, strict=True)):
            grids = batch.grids.to(self._device)
            read = self._read_words(grids, ids[:, :, :-1])
            with self.grad_sync(last=number == len(batches) - 1):
                with self._arithmetic():
                    logits, attention = self._model(grids, read)
                loss = caption_loss(logits, attention, ids[:, :, 1:], self._params.label_smoothing)
                total = loss.total(counts, self._params.doubly_stochastic_weight)
                # DistributedDataParallel takes the mean of the ranks' gradients, and they are parts of a sum.
                (total * self._processes.world_size).backward()  # type: ignore[no-untyped-call]
            sums[:2] += torch.stack([loss.cross_entropy, total]).detach()
            if shown:
                sums[2] += (torch.special.entr(attention.detach()).sum(dim=-1) * wanted[number]).sum()
        cross_entropy, value, entropy_sum = self._processes.sum(sums).tolist()
        words, captions = counts.tolist()
        self._require_finite("loss", value)
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), self._params.max_grad_norm)
        self._require_finite("norm of the gradient", norm.item())
        self._optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.decoder)
        self.progress.loss_sum += cross_entropy
        self.progress.words += int(words)
        return {
            "loss": cross_entropy / words,
            "learning_rate": rate,
            "gradient_norm": norm.item(),
            "captions": captions,
        } | ({"attention_entropy": entropy_sum / words} if shown else {})

    def _require_finite(self, name: str, value: float, begun: int = 1) -> None:
        """Stop where a value is not finite, in a step that has `begun`, or else after one."""
        if math.isfinite(value):
            return
        kept = (
            f"the last good checkpoint is {self._checkpoint}"
            if self._checkpoint.is_file()
            else "no checkpoint is kept yet"
        )
        rate = self._optimizer.param_groups[0]["lr"]
        raise UserError(
            f"the {name} is {value} in epoch {self.progress.epoch + begun}, step {self._steps_done + begun} of the run,"
            f" at a learning rate of {rate:.3g}; lower train.lr.peak or train.max_grad_norm in params.yaml"
            f" ({kept})"
        )

    def grad_sync(self, last: bool) -> AbstractContextManager[None]:
        """Gradients of all ranks meet once a step, with its last batch."""
        return self._model.no_sync() if isinstance(self._model, DistributedDataParallel) and not last else nullcontext()

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._params.precision == "bfloat16")

    @torch.no_grad()
    def _read_words(self, grids: Tensor, words: Tensor) -> Tensor:
        """The words [B, K, T] that the decoder reads: some of them its own, after scheduled sampling.

        Bengio et al. 2015 (arXiv:1506.03099), for all words at once (Duckworth et al. 2019, arXiv:1906.04331): a first
        pass reads what people wrote, and the words it draws stand in for theirs in the second.
        """
        share = self._params.scheduled_sampling * self._steps_done / (self._params.max_epochs * self._steps_per_epoch)
        if not share or words.shape[2] == 1:
            return words
        with self._arithmetic():
            logits, _ = self.decoder(grids, words[:, :, :-1])
        logits[..., [PAD, START]] = -torch.inf
        drawn = torch.multinomial(logits.float().softmax(dim=-1).flatten(0, 2), 1).view(logits.shape[:3])
        replaced = (torch.rand(drawn.shape, device=drawn.device) < share) & (words[:, :, 1:] != PAD)
        return torch.cat([words[:, :, :1], torch.where(replaced, drawn, words[:, :, 1:])], dim=2)

    def _end_epoch(self) -> None:
        progress = self.progress
        progress.epoch += 1
        row = {"epoch": progress.epoch, "train_loss": progress.loss_sum / progress.words}
        progress.batch, progress.loss_sum, progress.words = 0, 0.0, 0
        if self._processes.is_main:
            row |= self._validate()
            progress.history.append(row)
            score = progress.epoch if self._params.select_by == "last" else row[f"val_{self._params.select_by}"]
            if progress.best_score is None or score > progress.best_score:
                progress.best_score, progress.best_epoch = score, progress.epoch
                self.best = {name: tensor.detach().clone() for name, tensor in self.eval_model.state_dict().items()}
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
            if self._live:
                self._live.log(self._steps_done, {name: value for name, value in row.items() if name != "epoch"})
        self.progress = self._processes.broadcast(progress)
        self._save()

    @property
    def eval_model(self) -> SoftAttentionDecoder:
        """The decoder that is validated and kept: of averaged weights, where they are averaged."""
        if self._average is None:
            return self.decoder
        return cast(SoftAttentionDecoder, self._average.module)

    def _validate(self) -> dict[str, float]:
        """Loss and accuracy under teacher forcing, BLEU-4 and CIDEr-D of captions generated freely."""
        decoder = self.eval_model.eval()
        greedy = SearchParams.greedy(self._params.max_length)
        parts: list[TeacherForcedResult] = []
        generated: dict[int, list[str]] = {}
        for batch in self._val.in_order():
            parts.append(evaluate_batch(decoder, batch, self._device))
            self._require_finite("loss in validation", parts[-1].loss, begun=0)
            beams = caption_grids(
                [decoder], self._vocabulary.words, batch.grids.to(self._device), batch.image_ids, greedy
            )
            for image_id, (best, *_) in zip(batch.image_ids, beams, strict=True):
                generated[image_id] = [best.text]
        for image_id, captions in islice(generated.items(), _SAMPLES):
            print(f"  image {image_id}: {captions[0]}", flush=True)
        forced = merge_results(parts)
        return {
            "val_loss": forced.loss,
            "val_accuracy": float((forced.predicted == forced.target).mean()),
            "val_bleu4": float(Bleu(4).compute_score(self._references, generated, verbose=0)[0][3]),
            "val_cider": float(Cider().compute_score(self._references, generated)[0]),
        }

    def _save(self) -> None:
        generators = self._processes.gather(random_state(self._device))
        if self._processes.is_main:
            save_checkpoint(
                self._checkpoint, self.progress, self.decoder, self._optimizer, self._average, self.best, generators
            )


def _average(highest: float, averaged: tuple[Tensor, ...], present: tuple[Tensor, ...], count: Tensor) -> None:
    """Move averaged weights towards the present ones, by more at first: soon the first weights count for nothing."""
    steps = int(count)
    kept = min(highest, (1 + steps) / (10 + steps))
    get_ema_multi_avg_fn(kept)(averaged, present, count)  # type: ignore[no-untyped-call]


class _Interruption:
    """The signal that asked the process to end, once it has come."""

    signal: int | None = None

    def receive(self, number: int, _: object) -> None:
        self.signal = number

    def exit_if_requested(self, processes: Processes) -> None:
        """End the process as the signal wants, if one came to the first rank, by which all ranks go."""
        number = processes.broadcast(self.signal)
        if number is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextmanager
def _interruptible() -> Iterator[_Interruption]:
    interruption = _Interruption()
    before = {number: signal.signal(number, interruption.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
