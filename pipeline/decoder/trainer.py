"""Training the decoder on cached grids: resumable to the bit, selected by captions it generates freely.

Shapes: `B` images, `K` captions an image, `T` words, `P` regions.
"""

import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
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

import pipeline
from pipeline.captions.tokens import (
    TOKENS_FILE,
    VOCABULARY_FILE,
    CaptionTokens,
    read_tokens,
    references,
    require_vocabulary,
)
from pipeline.captions.vocabulary import PAD, START, Vocabulary, read_vocabulary
from pipeline.decoder.attention import AttentionDecoder, DecoderParams
from pipeline.decoder.batches import Batch, CaptionBatches
from pipeline.decoder.captioning import caption
from pipeline.decoder.checkpoint import Progress, load_checkpoint, random_state, save_checkpoint
from pipeline.decoder.forcing import Forced, force, merged
from pipeline.decoder.live import LiveMetrics
from pipeline.decoder.objective import objective
from pipeline.decoder.saved import HISTORY_FILE, ModelConfig, TrainingData, read_model, write_model
from pipeline.decoder.schedule import ScheduleParams
from pipeline.decoder.search import SearchParams
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.params import section
from pipeline.publish import fresh_folder, publish, write_json
from pipeline.ranks import ALONE, Ranks

CHECKPOINT_FILE = "checkpoint.safetensors"
MODEL_FOLDER = "model"
_SAMPLES = 3
"""Validation images whose captions are shown after each epoch."""


@section
class TrainParams:
    """How the decoder is built and trained."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Fixes the first weights, the order of batches and dropout."""
    decoder: DecoderParams
    images_a_batch: Annotated[int, Field(ge=1)]
    """Images that are read together, with all their captions."""
    batches_a_step: Annotated[int, Field(ge=1)]
    """Batches whose gradients make one step of the optimiser: more, where memory is short."""
    random_views: bool
    """Whether each epoch shows a random one of the stored views of an image (`encode.views`), or all the first."""
    epochs: Annotated[int, Field(ge=1)]
    """Times at most that every train image is seen."""
    optimiser: Literal["adam", "adamw"]
    """AdamW takes the weight decay off the weights, Adam adds it to their gradients."""
    weight_decay: Annotated[float, Field(ge=0)]
    """Pull of the weights towards 0, in learning rates."""
    learning_rate: ScheduleParams
    clip_norm: Annotated[float, Field(gt=0)]
    """Gradients with a larger Euclidean norm are scaled down to it."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    """Share of a word's target that is given to all words alike."""
    scheduled_sampling: Annotated[float, Field(ge=0, le=1)]
    """Share of the words read that the decoder itself predicts, by the last epoch; it rises from 0."""
    coverage_weight: Annotated[float, Field(ge=0)]
    """Weight of the doubly stochastic term: a mean over captions and regions, in units of the loss."""
    average: Annotated[float, Field(ge=0, lt=1)]
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
    max_words: Annotated[int, Field(ge=1)]
    """Words at which a validation caption is cut off."""


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """When a run writes something down; none of it changes what it computes."""

    checkpoint_steps: int
    """Steps after which a checkpoint is written at the latest."""
    checkpoint_seconds: float
    """Seconds after which one is."""
    live_steps: int
    """Steps from one row of live metrics to the next."""


def train(
    params: TrainParams,
    tokens: Path,
    features: Path,
    folder: Path,
    live: Path,
    device: torch.device,
    rhythm: Rhythm,
    ranks: Ranks = ALONE,
) -> Path:
    """Train a decoder on a folder of tokens and a feature store; returns the finished model folder.

    `folder` is the run's own: its name stands for params, inputs and code. What an earlier run left there is taken
    up, a finished model as it is. `live` is a folder for DVCLive's metrics. All `ranks` call this with the same
    arguments; the first writes.

    Raises `UserError` where an input is missing or damaged, and where the loss is not finite.
    """
    finished = folder / MODEL_FOLDER
    if ranks.from_first(_is_whole(finished) if ranks.first else False):
        if ranks.first:
            print(f"train: nothing to do, {finished} is the finished model of these params and inputs", flush=True)
        return finished
    vocabulary = read_vocabulary(tokens / VOCABULARY_FILE)
    require_vocabulary(tokens / TOKENS_FILE, vocabulary)
    store = FeatureStore(features)
    if ranks.first:
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
        ranks=ranks,
    )
    trainer.run(rhythm)
    if ranks.first:
        progress = trainer.progress
        config = ModelConfig(
            fingerprint=folder.name,
            decoder=params.decoder,
            vocabulary_digest=vocabulary.digest,
            encoder=store.setting,
            encoder_fingerprint=store.fingerprint,
            view=store.views[0],
            data=TrainingData(
                images=len(set(captions.image_id.tolist())),
                captions=len(captions.image_id),
                validation_images=len(set(val.image_id.tolist())),
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
        ranks: Ranks = ALONE,
    ) -> None:
        self._params = params
        self._vocabulary = vocabulary
        self._device = device
        self._ranks = ranks
        self._train = CaptionBatches(train, store, params.images_a_batch, params.random_views)
        self._val = CaptionBatches(val, store, params.images_a_batch)
        self._references = {
            image_id: [" ".join(words) for words in captions] for image_id, captions in references(val).items()
        }
        self._checkpoint = folder / CHECKPOINT_FILE
        torch.manual_seed(params.seed)
        self.decoder = AttentionDecoder(params.decoder, store.setting.grid, store.channels, len(vocabulary)).to(device)
        self.decoder.compiled = params.compile
        kind = torch.optim.AdamW if params.optimiser == "adamw" else torch.optim.Adam
        self._optimiser = kind(self.decoder.parameters(), weight_decay=params.weight_decay, fused=True)
        self._average = (
            AveragedModel(self.decoder, multi_avg_fn=partial(_average, params.average)) if params.average else None
        )
        # Each rank has a random generator of its own from here on: their shares of a batch drop different numbers.
        torch.manual_seed(params.seed + ranks.rank)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        if ranks.from_first(self._checkpoint.is_file()):
            self.progress, self.best = load_checkpoint(
                self._checkpoint, self.decoder, self._optimiser, self._average, ranks.rank
            )
            if ranks.first:
                print(
                    f"train: goes on from {self._checkpoint}: "
                    f"{self.progress.epoch} epochs and {self.progress.batch} batches are done",
                    flush=True,
                )
        self._model: nn.Module = DistributedDataParallel(self.decoder) if ranks.size > 1 else self.decoder
        self._live = LiveMetrics(live, self._steps_done) if ranks.first else None

    @property
    def _steps_an_epoch(self) -> int:
        return -(-len(self._train) // self._params.batches_a_step)

    @property
    def _steps_done(self) -> int:
        return self.progress.epoch * self._steps_an_epoch + -(-self.progress.batch // self._params.batches_a_step)

    def run(self, rhythm: Rhythm) -> None:
        """Train to the end, writing a checkpoint each epoch and as often as `rhythm` says.

        SIGTERM and SIGINT write a checkpoint before they end the process. Raises `UserError` where the loss is not
        finite.
        """
        with _interruptible() as interruption:
            while not self._finished():
                self._run_epoch(rhythm, interruption)

    def _finished(self) -> bool:
        stale = self.progress.epoch - self.progress.best_epoch
        return self.progress.epoch >= self._params.epochs or stale >= self._params.patience

    def _run_epoch(self, rhythm: Rhythm, interruption: "_Interruption") -> None:
        progress = self.progress
        batches = self._train.shuffled(
            self._params.seed, progress.epoch, first=progress.batch, share=(self._ranks.rank, self._ranks.size)
        )
        saved, steps = time.monotonic(), 0
        began, waited, captions = saved, 0.0, 0
        with tqdm(
            total=len(self._train),
            initial=progress.batch,
            desc=f"train, epoch {progress.epoch + 1} of {self._params.epochs}",
            unit="batch",
            disable=None if self._ranks.first else True,
        ) as bar:
            while True:
                asked = time.monotonic()
                group = list(islice(batches, self._params.batches_a_step))
                waited += time.monotonic() - asked
                if not group:
                    break
                number = self._steps_done + 1
                shown = number == 1 or number % rhythm.live_steps == 0
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
                due = steps % rhythm.checkpoint_steps == 0 or time.monotonic() - saved > rhythm.checkpoint_seconds
                if self._ranks.from_first(due or interruption.signal is not None):
                    self._save()
                    saved = time.monotonic()
                    interruption.obey(self._ranks)
        self._end_epoch()

    def _step(self, batches: Sequence[Batch], shown: bool) -> dict[str, float]:
        """Take one step of the optimiser; returns its metrics, with the entropy of attention where they are `shown`.

        `batches` are this rank's share of the step.
        """
        self.decoder.train()
        rate = self._params.learning_rate.at(self._steps_done, self._steps_an_epoch, self._params.epochs)
        for parameters in self._optimiser.param_groups:
            parameters["lr"] = rate
        tokens = [batch.tokens.to(self._device) for batch in batches]
        wanted = [ids[:, :, 1:] != PAD for ids in tokens]
        asked = [torch.stack([words.sum(), words.any(dim=2).sum()]) for words in wanted]
        counts = self._ranks.sum(torch.stack(asked).sum(dim=0).double())
        self._optimiser.zero_grad(set_to_none=True)
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        for number, (batch, ids) in enumerate(zip(batches, tokens, strict=True)):
            grids = batch.grids.to(self._device)
            read = self._read_words(grids, ids[:, :, :-1])
            with self._exchange(last=number == len(batches) - 1):
                with self._arithmetic():
                    logits, attention = self._model(grids, read)
                loss = objective(logits, attention, ids[:, :, 1:], self._params.label_smoothing)
                total = loss.total(counts, self._params.coverage_weight)
                # DistributedDataParallel takes the mean of the ranks' gradients, and they are parts of a sum.
                (total * self._ranks.size).backward()  # type: ignore[no-untyped-call]
            sums[:2] += torch.stack([loss.cross_entropy, total]).detach()
            if shown:
                sums[2] += (torch.special.entr(attention.detach()).sum(dim=-1) * wanted[number]).sum()
        cross_entropy, value, entropy_sum = self._ranks.sum(sums).tolist()
        words, captions = counts.tolist()
        self._require_finite("loss", value)
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), self._params.clip_norm)
        self._require_finite("norm of the gradient", norm.item())
        self._optimiser.step()
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
        rate = self._optimiser.param_groups[0]["lr"]
        raise UserError(
            f"the {name} is {value} in epoch {self.progress.epoch + begun}, step {self._steps_done + begun} of the run,"
            f" at a learning rate of {rate:.3g}; lower train.learning_rate.highest or train.clip_norm in params.yaml"
            f" ({kept})"
        )

    def _exchange(self, last: bool) -> AbstractContextManager[None]:
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
        share = self._params.scheduled_sampling * self._steps_done / (self._params.epochs * self._steps_an_epoch)
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
        if self._ranks.first:
            row |= self._validate()
            progress.history.append(row)
            score = progress.epoch if self._params.select_by == "last" else row[f"val_{self._params.select_by}"]
            if progress.best_score is None or score > progress.best_score:
                progress.best_score, progress.best_epoch = score, progress.epoch
                self.best = {name: tensor.detach().clone() for name, tensor in self._judged.state_dict().items()}
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
            if self._live:
                self._live.log(self._steps_done, {name: value for name, value in row.items() if name != "epoch"})
        self.progress = self._ranks.from_first(progress)
        self._save()

    @property
    def _judged(self) -> AttentionDecoder:
        """The decoder that is validated and kept: of averaged weights, where they are averaged."""
        if self._average is None:
            return self.decoder
        return cast(AttentionDecoder, self._average.module)

    def _validate(self) -> dict[str, float]:
        """Loss and accuracy under teacher forcing, BLEU-4 and CIDEr-D of captions generated freely."""
        decoder = self._judged.eval()
        greedy = SearchParams.greedy(self._params.max_words)
        parts: list[Forced] = []
        generated: dict[int, list[str]] = {}
        for batch in self._val.in_order():
            parts.append(force(decoder, batch, self._device))
            self._require_finite("loss in validation", parts[-1].loss, begun=0)
            beams = caption([decoder], batch.grids.to(self._device), batch.image_ids, greedy)
            for image_id, (best, *_) in zip(batch.image_ids, beams, strict=True):
                generated[image_id] = [" ".join(self._vocabulary.decode(best.words))]
        for image_id, captions in islice(generated.items(), _SAMPLES):
            print(f"  image {image_id}: {captions[0]}", flush=True)
        forced = merged(parts)
        return {
            "val_loss": forced.loss,
            "val_accuracy": float((forced.predicted == forced.target).mean()),
            "val_bleu4": float(Bleu(4).compute_score(self._references, generated, verbose=0)[0][3]),
            "val_cider": float(Cider().compute_score(self._references, generated)[0]),
        }

    def _save(self) -> None:
        generators = self._ranks.gather(random_state(self._device))
        if self._ranks.first:
            save_checkpoint(
                self._checkpoint, self.progress, self.decoder, self._optimiser, self._average, self.best, generators
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

    def obey(self, ranks: Ranks) -> None:
        """End the process as the signal wants, if one came to the first rank, by which all ranks go."""
        number = ranks.from_first(self.signal)
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
