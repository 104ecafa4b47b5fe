"""Training the decoder on cached grids: resumable to the bit, selected by captions it generates freely.

Shapes: `B` images, `K` captions an image, `T` words.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from pipeline.captions.tokens import TOKENS_FILE, VOCABULARY_FILE, CaptionTokens, read_tokens, references
from pipeline.captions.vocabulary import PAD, Vocabulary, read_vocabulary
from pipeline.decoder.attention import AttentionDecoder, DecoderParams
from pipeline.decoder.batches import Batch, CaptionBatches
from pipeline.decoder.captioning import caption
from pipeline.decoder.checkpoint import Progress, load_checkpoint, save_checkpoint
from pipeline.decoder.forcing import teacher_forced
from pipeline.decoder.objective import objective
from pipeline.decoder.saved import HISTORY_FILE, ModelConfig, write_model
from pipeline.decoder.search import SearchParams
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.params import section
from pipeline.publish import fresh_folder, publish, write_json

CHECKPOINT_FILE = "checkpoint.safetensors"
MODEL_FOLDER = "model"


@section
class TrainParams:
    """How the decoder is built and trained."""

    seed: int
    """Fixes the first weights, the order of batches and dropout."""
    decoder: DecoderParams
    images_a_batch: Annotated[int, Field(ge=1)]
    """Images whose captions, all of them, make one step."""
    epochs: Annotated[int, Field(ge=1)]
    """Times at most that every train image is seen."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Adam's step size at its highest."""
    warm_up: Annotated[int, Field(ge=0)]
    """Steps over which the learning rate rises from 0."""
    decay: Literal["none", "cosine"]
    """Whether the learning rate stays, or falls to 0 along a cosine by the last epoch."""
    clip_norm: Annotated[float, Field(gt=0)]
    """Gradients with a larger Euclidean norm are scaled down to it."""
    coverage_weight: Annotated[float, Field(ge=0)]
    """Weight of the doubly stochastic term: a mean over captions and regions, in units of the loss."""
    select_by: Literal["bleu4", "cider"]
    """Score of greedy validation captions that chooses the epoch to keep and stops training."""
    patience: Annotated[int, Field(ge=1)]
    """Epochs without a better score after which training stops."""
    max_words: Annotated[int, Field(ge=1)]
    """Words at which a validation caption is cut off."""


def train(
    params: TrainParams,
    tokens: Path,
    features: Path,
    folder: Path,
    device: torch.device,
    checkpoint_seconds: float,
) -> Path:
    """Train a decoder on a folder of tokens and a feature store; returns the finished model folder.

    `folder` is the run's own: its name stands for params, inputs and code. What an earlier run left there is taken
    up, a finished model as it is.

    Raises `UserError` where an input is missing or damaged, and where the loss is not finite.
    """
    finished = folder / MODEL_FOLDER
    if finished.is_dir():
        print(f"train: nothing to do, {finished} is the finished model of these params and inputs", flush=True)
        return finished
    vocabulary = read_vocabulary(tokens / VOCABULARY_FILE)
    store = FeatureStore(features)
    trainer = Trainer(
        params=params,
        train=read_tokens(tokens / TOKENS_FILE, "train"),
        val=read_tokens(tokens / TOKENS_FILE, "val"),
        store=store,
        vocabulary=vocabulary,
        folder=folder,
        device=device,
    )
    trainer.run(checkpoint_seconds)
    progress = trainer.progress
    assert progress.best_score is not None
    config = ModelConfig(
        fingerprint=folder.name,
        decoder=params.decoder,
        grid=store.setting.grid,
        channels=store.channels,
        vocabulary_digest=vocabulary.digest,
        encoder={"fingerprint": store.fingerprint, **asdict(store.setting)},
        epoch=progress.best_epoch,
        selected_by=params.select_by,
        selection_score=progress.best_score,
    )
    with fresh_folder(finished) as unfinished:
        write_model(unfinished, trainer.best, vocabulary, config)
        write_json(unfinished / HISTORY_FILE, progress.history)
        publish(unfinished, finished)
    (folder / CHECKPOINT_FILE).unlink()
    return finished


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
        device: torch.device,
    ) -> None:
        self._params = params
        self._vocabulary = vocabulary
        self._device = device
        self._train = CaptionBatches(train, store, params.images_a_batch)
        self._val = CaptionBatches(val, store, params.images_a_batch)
        self._references = {
            image_id: [" ".join(words) for words in captions] for image_id, captions in references(val).items()
        }
        self._checkpoint = folder / CHECKPOINT_FILE
        torch.manual_seed(params.seed)
        self.decoder = AttentionDecoder(params.decoder, store.setting.grid, store.channels, len(vocabulary)).to(device)
        self._optimiser = torch.optim.Adam(self.decoder.parameters(), lr=params.learning_rate)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        if self._checkpoint.is_file():
            self.progress, self.best = load_checkpoint(self._checkpoint, self.decoder, self._optimiser)
            print(
                f"train: goes on from {self._checkpoint}: "
                f"{self.progress.epoch} epochs and {self.progress.step} steps are done",
                flush=True,
            )

    def run(self, checkpoint_seconds: float) -> None:
        """Train to the end, writing a checkpoint each epoch and at least every `checkpoint_seconds`.

        SIGTERM and SIGINT write a checkpoint before they end the process. Raises `UserError` where the loss is not
        finite.
        """
        with _interruptible() as interruption:
            while not self._finished():
                self._run_epoch(checkpoint_seconds, interruption)

    def _finished(self) -> bool:
        stale = self.progress.epoch - self.progress.best_epoch
        return self.progress.epoch >= self._params.epochs or stale >= self._params.patience

    def _run_epoch(self, checkpoint_seconds: float, interruption: "_Interruption") -> None:
        progress = self.progress
        batches = self._train.shuffled(self._params.seed, progress.epoch, first=progress.step)
        saved = time.monotonic()
        with tqdm(
            total=len(self._train),
            initial=progress.step,
            desc=f"train, epoch {progress.epoch + 1} of {self._params.epochs}",
            unit="batch",
        ) as bar:
            began, captions = time.monotonic(), 0
            for batch in batches:
                progress.loss_sum += self._step(batch)
                progress.step += 1
                captions += int((batch.tokens[:, :, 0] != PAD).sum())
                bar.set_postfix_str(
                    f"loss {progress.loss_sum / progress.step:.3f}, "
                    f"{captions / (time.monotonic() - began):.0f} captions/s",
                    refresh=False,
                )
                bar.update()
                if interruption.signal is not None:
                    self._save()
                    interruption.obey()
                if time.monotonic() - saved > checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
        self._end_epoch()

    def _step(self, batch: Batch) -> float:
        self.decoder.train()
        rate = self._learning_rate()
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        tokens = batch.tokens.to(self._device)
        logits, attention = self.decoder(batch.grids.to(self._device), tokens[:, :, :-1])
        loss = objective(logits, attention, tokens[:, :, 1:], self._params.coverage_weight)
        value = loss.cross_entropy.item()
        if not math.isfinite(loss.total.item()):
            raise UserError(
                f"the loss is {loss.total.item()} in epoch {self.progress.epoch + 1}, step {self.progress.step + 1}, "
                f"at a learning rate of {rate:.3g}; lower train.learning_rate or train.clip_norm in params.yaml. "
                f"The last good checkpoint is {self._checkpoint}"
            )
        self._optimiser.zero_grad(set_to_none=True)
        loss.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), self._params.clip_norm)
        self._optimiser.step()
        return value

    def _learning_rate(self) -> float:
        done = self.progress.epoch * len(self._train) + self.progress.step
        rate = self._params.learning_rate * min(1.0, (done + 1) / max(1, self._params.warm_up))
        if self._params.decay == "cosine":
            rate *= (1 + math.cos(math.pi * done / (self._params.epochs * len(self._train)))) / 2
        return rate

    def _end_epoch(self) -> None:
        progress = self.progress
        scores = self._validate()
        progress.epoch += 1
        row = {"epoch": progress.epoch, "train_loss": progress.loss_sum / progress.step, **scores}
        progress.history.append(row)
        progress.step, progress.loss_sum = 0, 0.0
        score = scores[f"val_{self._params.select_by}"]
        if progress.best_score is None or score > progress.best_score:
            progress.best_score, progress.best_epoch = score, progress.epoch
            self.best = {name: tensor.detach().clone() for name, tensor in self.decoder.state_dict().items()}
        self._save()
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)

    def _validate(self) -> dict[str, float]:
        """Loss and accuracy under teacher forcing, BLEU-4 and CIDEr-D of captions generated freely."""
        self.decoder.eval()
        greedy = SearchParams(beam=1, max_words=self._params.max_words, length_exponent=0.0, allow_unknown=False)
        forced = teacher_forced(self.decoder, self._val, self._device)
        generated: dict[int, list[str]] = {}
        for batch in self._val.in_order():
            beams = caption(self.decoder, batch.grids.to(self._device), greedy)
            for image_id, (best, *_) in zip(batch.image_ids, beams, strict=True):
                generated[image_id] = [" ".join(self._vocabulary.decode(best.words))]
        return {
            "val_loss": forced.loss,
            "val_accuracy": float((forced.predicted == forced.target).mean()),
            "val_bleu4": float(Bleu(4).compute_score(self._references, generated, verbose=0)[0][3]),
            "val_cider": float(Cider().compute_score(self._references, generated)[0]),
        }

    def _save(self) -> None:
        save_checkpoint(self._checkpoint, self.progress, self.decoder, self._optimiser, self.best)


class _Interruption:
    """The signal that asked the process to end, once it has come."""

    signal: int | None = None

    def receive(self, number: int, _: object) -> None:
        self.signal = number

    def obey(self) -> None:
        assert self.signal is not None
        signal.signal(self.signal, signal.SIG_DFL)
        signal.raise_signal(self.signal)


@contextmanager
def _interruptible() -> Iterator[_Interruption]:
    interruption = _Interruption()
    before = {number: signal.signal(number, interruption.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
