"""Self-critical sequence training (Rennie et al. 2017, arXiv:1612.00563): learning from sampled captions.

The policy gradient of CIDEr-D is the gradient of the cross-entropy of each sampled caption, times its advantage: its
reward minus a baseline. `<end>` is a word of samples and references. Without it, captions learn to break off, since
CIDEr-D does not notice a missing end.

Shapes: `B` images, `K` sampled captions per image, `G` captions of the dataset per image, `T` words, `V` vocabulary
size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.captions.tokens import CaptionTokens, group_references
from pipeline.captions.vocabulary import END, PAD, SPECIALS, START, UNK
from pipeline.decoder.decoder import DecoderParams
from pipeline.decoder.model_io import TrainedModel
from pipeline.device import to_device
from pipeline.distributed import SINGLE_PROCESS, Processes
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.generation.ensemble import caption_grids
from pipeline.generation.search import SearchParams
from pipeline.metrics.bleu import bleu, bleu_counts
from pipeline.metrics.cider import DocumentFrequencies, cider, is_defined
from pipeline.metrics.corpus import Words
from pipeline.metrics.diversity import ends_badly
from pipeline.params import params_section
from pipeline.training.batches import Batch
from pipeline.training.loss import Loss, caption_loss
from pipeline.training.lr_schedule import LRParams
from pipeline.training.trainer import Targets, Trainer, TrainParams
from pipeline.training.validation import SelectBy

_END_WORD = SPECIALS[END]
_FORBIDDEN = [PAD, START, UNK]
"""Ids that are never sampled."""


@params_section
class RefineParams:
    """Section `refine`: self-critical training of the trained decoder."""

    max_epochs: Annotated[int, Field(ge=0, le=100_000)]
    """Maximum number of epochs; 0 disables the stage, which then passes the trained model on."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Random seed of batch order and samples."""
    batch_size: Annotated[int, Field(ge=1, le=4096)]
    """Images per optimizer step."""
    num_samples: Annotated[int, Field(ge=1, le=100)]
    """Captions sampled per image; at least 2 with baseline mean."""
    baseline: Literal["mean", "greedy"]
    """Baseline of the reward: mean reward of the image's other samples (Luo 2020), or reward of the greedy caption."""
    bleu4_weight: Annotated[float, Field(ge=0, le=100)]
    """Weight of sentence BLEU-4 in the reward, which is CIDEr-D plus this times BLEU-4; 0 disables it."""
    cross_entropy_weight: Annotated[float, Field(ge=0, lt=1)]
    """Share of the cross-entropy of the dataset's captions in the loss; 0 disables it."""
    lr: LRParams
    max_grad_norm: Annotated[float, Field(gt=0)]
    """Maximum L2 norm of the gradients; larger gradients are scaled down."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    """EMA decay of the weights, from those of the trained model; 0 disables it."""
    precision: Literal["float32", "bfloat16"]
    """Precision of matrix products (autocast); weights and loss are always float32."""
    select_by: SelectBy
    """Metric of greedy validation captions that selects the best epoch, the trained model included; `last` keeps the
    last epoch."""
    patience: Annotated[int, Field(ge=1, le=100_000)]
    """Epochs without improvement before early stopping."""
    max_length: Annotated[int, Field(ge=1, le=1000)]
    """Maximum words of a sampled or validation caption."""

    def __post_init__(self) -> None:
        if self.baseline == "mean" and self.num_samples < 2:
            raise ValueError(f"num_samples must be at least 2 with baseline mean, got {self.num_samples}")

    def train_params(self, decoder: DecoderParams) -> TrainParams:
        """Return the params of the optimizer steps, for a decoder of given sizes.

        Dropout is off: the gradient is unbiased only for the distribution that the captions were sampled from.
        """
        return TrainParams(
            seed=self.seed,
            start_from=None,
            start_from_grids="refuse",
            decoder=replace(decoder, dropout=0.0, region_dropout=0.0, word_dropout=0.0),
            text=Path(),  # which `tokenize` reads, and nothing else
            text_pretraining=None,
            batch_size=self.batch_size,
            gradient_accumulation_steps=1,
            random_views=False,
            max_epochs=self.max_epochs,
            optimizer="adam",
            weight_decay=0.0,
            lr=self.lr,
            max_grad_norm=self.max_grad_norm,
            label_smoothing=0.0,
            scheduled_sampling=0.0,
            doubly_stochastic_weight=0.0,
            ema_decay=self.ema_decay,
            precision=self.precision,
            compile=False,
            select_by=self.select_by,
            patience=self.patience,
            max_length=self.max_length,
        )


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """Sampled captions of one batch."""

    tokens: Tensor
    """Token ids [B, K, T + 1], padded with `<pad>`."""
    advantage: Tensor
    """Reward minus baseline of each caption [B, K]."""
    sums: Tensor
    """Sum of each of `_METRICS` over the captions, float64 [5]."""


_METRICS = ("reward", "baseline", "bad_endings", "distinct", "length")
"""Metrics of the samples of a step, as means over captions: `bad_endings` is the fraction that reach the maximum length
or end in a function word, `distinct` the number of different captions of an image divided by K, `length` the words."""


class SelfCriticalTrainer(Trainer):
    """A run of self-critical training. Epoch 0 is the trained model, which validation can select, too."""

    stage = "refine"

    _warms_up_ema = False  # so that the average contains the trained model

    def __init__(
        self,
        *,
        params: RefineParams,
        model: TrainedModel,
        train: CaptionTokens,
        val: CaptionTokens,
        store: FeatureStore,
        checkpoint: Path,
        device: torch.device,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        """Start from a trained model.

        Args:
            params: Section `refine`.
            model: The trained model.
            train: Captions of the train split.
            val: Captions of the validation split.
            store: Grids of the images of both splits.
            checkpoint: Checkpoint file, read if it exists and written by `save_checkpoint`.
            device: Device to train on.
            processes: The processes that share every batch.

        Raises:
            UserError: The checkpoint is damaged, the reward is not defined for the train split, or the metric that
                selects the epoch is not defined for the validation split.
        """
        super().__init__(
            params=params.train_params(model.config.decoder),
            train=train,
            val=val,
            store=store,
            vocabulary=model.vocabulary,
            checkpoint=checkpoint,
            device=device,
            processes=processes,
            initial_weights=model.decoder.state_dict(),
        )
        self._refine = params
        self._token_ids = {word: index for index, word in enumerate(self.vocabulary.words)}
        self._references: dict[int, list[Words]] = {
            image_id: [(*words, _END_WORD) for words in captions]
            for image_id, captions in group_references(train).items()
        }
        if not is_defined(list(self._references.values())):
            raise UserError(
                "refine: CIDEr-D is not defined for the train split, which has one image or the same references for all"
                " images. Set refine.max_epochs to 0."
            )
        self._document_frequencies = DocumentFrequencies(list(self._references.values()))
        if not self.is_resumed:
            self._record_epoch(self._train_metrics())

    def _train_metrics(self) -> dict[str, float | None]:
        num_samples = self.progress.num_samples
        return {"train_reward": self.progress.reward_sum / num_samples if num_samples else None}

    def _select_targets(self, batches: Sequence[Batch]) -> tuple[list[Targets], Tensor]:
        """Sample captions of each batch, and weight the cross-entropy of each by its advantage."""
        samples = [self._sample(batch) for batch in batches]
        references = [batch.tokens for batch in batches]  # each [B, G, T + 1]
        counts = self._count([batch.tokens for batch in samples])
        num_sampled, num_reference = counts[0], self._count(references)[0]
        share = self._refine.cross_entropy_weight
        targets = []
        for batch, captions in zip(samples, references, strict=True):
            # The trainer divides by the number of all words, and each of the two means by its own.
            num_words = num_sampled + num_reference if share else num_sampled
            tokens, weights = batch.tokens, (1 - share) * num_words / num_sampled * batch.advantage
            if share:
                reference_weight = (share * num_words / num_reference).to(weights.dtype)
                reference_weights = reference_weight.expand(captions.shape[:2])
                tokens, weights = _concatenate(tokens, captions), torch.cat([weights, reference_weights], dim=1)
            targets.append(Targets(tokens=tokens, weights=weights))
        sums = self.processes.sum(torch.stack([batch.sums for batch in samples]).sum(dim=0))  # [5]
        return targets, torch.cat([sums, counts[1:]])

    def _record_samples(self, sums: Sequence[float]) -> dict[str, float]:
        *sums, num_samples = sums
        self.progress.reward_sum += sums[0]
        self.progress.num_samples += int(num_samples)
        return {name: value / num_samples for name, value in zip(_METRICS, sums, strict=True)}

    def _loss(self, outputs: Tensor, alpha: Tensor, ids: Tensor, weights: Tensor | None) -> Loss:
        logits = self.decoder.output_proj(outputs)  # [B, K, T, V]
        # As in sampling, which never draws these. References may contain `<unk>`.
        for token in _FORBIDDEN:
            logits[:, : self._refine.num_samples, :, token] = -torch.inf
        with torch.autocast(logits.device.type, enabled=False):
            return caption_loss(logits, alpha, ids, weights=weights)

    def _sample(self, batch: Batch) -> _Samples:
        """Sample captions of the images of a batch, without dropout, and compare their rewards with the baseline."""
        num_samples, max_length = self._refine.num_samples, self._refine.max_length
        if not batch.has_captions:
            empty = torch.full((len(batch.image_ids), num_samples, 2), PAD, device=self._device)
            zeros = torch.zeros(empty.shape[:2], device=self._device)
            no_sums = torch.zeros(len(_METRICS), dtype=torch.float64, device=self._device)
            return _Samples(tokens=empty, advantage=zeros, sums=no_sums)
        # Depends on the step, not on the process or on when the run was resumed.
        seed = int(np.random.SeedSequence([self._refine.seed, self.global_step]).generate_state(1)[0])
        captions = self._generate(batch, SearchParams.sampling(num_samples, max_length, seed))
        reward = self._reward(batch.image_ids, captions)  # [B, K]
        if self._refine.baseline == "mean":
            baseline = (reward.sum(axis=1, keepdims=True) - reward) / (num_samples - 1)
        else:
            greedy = self._generate(batch, SearchParams.greedy(max_length))
            baseline = self._reward(batch.image_ids, greedy).repeat(num_samples, axis=1)
        flat = list(chain.from_iterable(captions))
        sums = [
            reward.sum(),
            baseline.sum(),
            sum(ends_badly(words[:-1]) if words[-1] == _END_WORD else True for words in flat),
            sum(len(set(image)) for image in captions),
            sum(len(words) - (words[-1] == _END_WORD) for words in flat),
        ]
        ids = [[START, *(self._token_ids[word] for word in words)] for words in flat]
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True, padding_value=PAD)
        return _Samples(
            tokens=to_device(tokens.view(*reward.shape, -1), self._device),
            advantage=to_device(torch.from_numpy(reward - baseline), self._device),
            sums=to_device(torch.tensor(sums, dtype=torch.float64), self._device),
        )

    def _generate(self, batch: Batch, search: SearchParams) -> list[list[tuple[str, ...]]]:
        """Generate captions of each image, with `<end>` unless they reach the maximum length."""
        self.decoder.eval()
        search = replace(search, precision=self.params.precision)
        try:
            results = caption_grids([self.decoder], self.vocabulary.words, batch.grids, batch.image_ids, search)
        except UserError as error:
            self._read_pending()
            lr = self._state.optimizer.param_groups[0]["lr"]
            problem = "the probability of a sampled caption is not finite"
            raise self._divergence(problem, self.progress.epoch + 1, self.global_step + 1, lr) from error
        return [[_complete(caption.words, search.max_length) for caption in image] for image in results]

    def _reward(self, image_ids: Sequence[int], captions: Sequence[Sequence[Words]]) -> NDArray[np.float64]:
        """Compute the reward [B, K] of the captions of each image."""
        pairs = zip(image_ids, captions, strict=True)
        references = [self._references[image_id] for image_id, image in pairs for _ in image]
        flat = list(chain.from_iterable(captions))
        reward = cider(flat, references, self._document_frequencies).cider_d
        if self._refine.bleu4_weight:
            reward = reward + self._refine.bleu4_weight * bleu(bleu_counts(flat, references))[:, 3]
        return reward.reshape(len(image_ids), -1)


def _complete(words: tuple[str, ...], max_length: int) -> tuple[str, ...]:
    """Add `<end>` to a caption, unless it was cut off at the maximum length."""
    return words if len(words) == max_length else (*words, _END_WORD)


def _concatenate(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate the captions [B, K, T] and [B, G, T'] of each image, padded to the longer ones: [B, K + G, T'']."""
    length = max(a.shape[2], b.shape[2])
    return torch.cat([F.pad(tokens, (0, length - tokens.shape[2]), value=PAD) for tokens in (a, b)], dim=1)
