"""Training on captions without images: each gets regions that are predicted from its words.

A linear regression predicts the mean region of an image from the words of a caption. Captions of different images
differ in much more than their words predict. So a caption without an image gets the regions of a random train image,
shifted by the difference of the two predictions: that of the caption, and that of a caption of the train image. The
decoder learns from them as from regions of images, and usual training continues with its weights, with a batch of text
for every batch of images.

CapDec (Nukrai et al. 2022, arXiv:2211.00575) and DeCap (Li et al. 2023, arXiv:2303.03032) train decoders on text alone.
There, CLIP embeds captions and images in one space, and noise or a memory bridges the gap between the two. Here, the
regression connects captions with the grids of any encoder, and the residual of a train image is the noise.

Shapes: `B` captions, `P` regions of a grid, `R` pseudo-regions, `C` channels, `V` vocabulary size, `T` ids.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from pipeline.captions.tokens import CaptionTokens
from pipeline.captions.vocabulary import PAD, SPECIALS
from pipeline.cuda_graphs import GraphedFunction
from pipeline.distributed import SINGLE_PROCESS, Processes
from pipeline.features.store import FeatureStore, Grids
from pipeline.training.batches import Batch, CaptionBatches
from pipeline.training.trainer import Targets, TextPretrainingParams, Trainer, TrainParams

_INTERCEPT = PAD
"""Row of the regression for what does not depend on the words. No caption has this id."""
_IMAGES_PER_READ = 64
_NUM_DRAWS = 2**31
"""Number of different pseudo-grids of a caption."""


class GridRegression:
    """Ridge regression of the mean layer-normalized region of an image on the set of words of a caption of it."""

    def __init__(self, weight: Tensor) -> None:
        """Use given coefficients.

        Args:
            weight: Coefficients of each word, and the intercept in the row of `<pad>` [V, C].
        """
        self.weight = weight

    @classmethod
    def fit(cls, captions: CaptionTokens, store: FeatureStore, vocab_size: int, penalty: float) -> "GridRegression":
        """Fit the regression to every caption of the train split and the first view of its image.

        Images are read once and not kept, and of captions only the normal equations: [V, V] and [V, C] in float64.

        Args:
            captions: Captions of the train split.
            store: Grids of its images.
            vocab_size: Vocabulary size, V.
            penalty: Penalty on the squared coefficients, intercept excluded; above 0.
        """
        gram = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
        cross = torch.zeros(vocab_size, store.channels, dtype=torch.float64)
        first = captions.first_of_image
        num_captions = np.diff(first, append=len(captions.image_id))
        with tqdm(desc="train, regression", total=len(first), unit="image", leave=False, disable=None) as progress:
            for start in range(0, len(first), _IMAGES_PER_READ):
                images = slice(start, start + _IMAGES_PER_READ)
                grids = store.grids(captions.image_id[first[images]].tolist())
                means = _normalize(grids).mean(dim=1).double()  # [B, C]
                rows = range(first[start], first[start] + int(num_captions[images].sum()))
                owners = np.repeat(np.arange(len(means)), num_captions[images]).tolist()
                for row, owner in zip(rows, owners, strict=True):
                    words = _distinct_words(captions, row)
                    gram.index_put_((words.unsqueeze(1), words.unsqueeze(0)), torch.ones((), dtype=torch.float64), True)
                    cross.index_add_(0, words, means[owner].expand(len(words), -1))
                progress.update(len(means))
        ridge = torch.full((vocab_size,), penalty, dtype=torch.float64)
        # Words that no train caption has: any penalty gives coefficients of 0.
        ridge[_INTERCEPT] = 0.0
        return cls(torch.linalg.solve(gram + torch.diag(ridge), cross).float())

    def predict(self, captions: CaptionTokens, rows: Iterable[int]) -> Tensor:
        """Predict the mean region [B, C] of some captions."""
        return torch.stack([self.weight[_distinct_words(captions, row)].sum(dim=0) for row in rows])


def _distinct_words(captions: CaptionTokens, row: int) -> Tensor:
    """Return the ids of the distinct words of a caption, and `_INTERCEPT`."""
    ids = np.unique(captions.ids[captions.offset[row] : captions.offset[row + 1]])
    return torch.from_numpy(np.append(_INTERCEPT, ids[ids >= len(SPECIALS)]).astype(np.int64))


def _normalize(grids: Grids) -> Tensor:
    """Return layer-normalized grids [B, P, C] in float32, as decoders see them."""
    normalized: Tensor = F.layer_norm(torch.from_numpy(grids).float(), grids.shape[2:])
    return normalized


class PseudoGrids:
    """Grids of pseudo-regions for captions without images, in place of a feature store.

    The pseudo-grid of a caption depends on the caption and on the view alone, which is a random draw.
    """

    views = range(_NUM_DRAWS)
    """Every draw gives another pseudo-grid of the same caption."""

    def __init__(
        self,
        text: CaptionTokens,
        train: CaptionTokens,
        store: FeatureStore,
        regression: GridRegression,
        params: TextPretrainingParams,
        num_views: int,
    ) -> None:
        """Use the images of the train split.

        Args:
            text: Captions without images; `image_id` is the index of the caption.
            train: Captions of the train split.
            store: Grids of its images.
            regression: Regression that was fitted to them.
            params: Number of pseudo-regions, and noise.
            num_views: Views of an image to draw from.
        """
        self._text = text
        self._train = train
        self._store = store
        self._regression = regression
        self._params = params
        self._num_views = num_views
        self._first_caption = train.first_of_image
        self._num_captions = np.diff(self._first_caption, append=len(train.image_id))

    def grids(self, image_ids: Iterable[int], views: Iterable[int]) -> Grids:
        """Draw the pseudo-grids [B, R, C] of some captions.

        Args:
            image_ids: Indices of the captions.
            views: Number of the draw of each caption.
        """
        rows = list(image_ids)
        generators = [np.random.default_rng(seed) for seed in zip(rows, views, strict=True)]
        images = [int(rng.integers(len(self._first_caption))) for rng in generators]
        captions = [
            int(self._first_caption[image] + rng.integers(self._num_captions[image]))
            for image, rng in zip(images, generators, strict=True)
        ]
        image_views = [int(rng.integers(self._num_views)) for rng in generators]
        regions = _normalize(self._store.grids(self._train.image_id[captions].tolist(), image_views))  # [B, P, C]
        num_regions = min(self._params.num_regions, regions.shape[1])
        # In the order of the grid, so that all regions together have their positions.
        chosen = [np.sort(rng.choice(regions.shape[1], num_regions, replace=False)) for rng in generators]
        sampled = torch.stack([image[index] for image, index in zip(regions, chosen, strict=True)])  # [B, R, C]
        center = regions.mean(dim=1, keepdim=True) - sampled.mean(dim=1, keepdim=True)  # [B, 1, C]
        shift = self._regression.predict(self._text, rows) - self._regression.predict(self._train, captions)  # [B, C]
        noise = torch.stack([torch.from_numpy(rng.standard_normal(regions.shape[2])) for rng in generators])  # [B, C]
        pseudo = sampled + center + (shift + self._params.noise * noise.float()).unsqueeze(1)  # [B, R, C]
        grids: NDArray[np.float16] = pseudo.numpy().astype(np.float16)
        return grids


@dataclass(frozen=True, kw_only=True)
class Text:
    """Captions without images, with their grids."""

    captions: CaptionTokens
    grids: PseudoGrids
    params: TextPretrainingParams

    @classmethod
    def fit(
        cls,
        captions: CaptionTokens,
        train: CaptionTokens,
        store: FeatureStore,
        vocab_size: int,
        params: TrainParams,
        processes: Processes = SINGLE_PROCESS,
    ) -> "Text":
        """Fit the regression to the train split, in one process for all of them.

        Args:
            captions: Captions without images.
            train: Captions of the train split.
            store: Grids of its images.
            vocab_size: Vocabulary size, V.
            params: Training of the decoder, on text, too.
            processes: The processes that share every batch.
        """
        pretraining = params.text_pretraining
        assert pretraining is not None
        fitted = GridRegression.fit(train, store, vocab_size, pretraining.ridge_penalty) if processes.is_main else None
        regression = processes.broadcast(fitted)
        assert regression is not None
        num_views = len(store.views) if params.random_views else 1
        grids = PseudoGrids(captions, train, store, regression, pretraining, num_views)
        return cls(captions=captions, grids=grids, params=pretraining)


def _text_batch_size(params: TrainParams, train: CaptionTokens) -> int:
    """Return the captions of a batch of text: as many as those of a batch of images."""
    captions_per_image = len(train.image_id) / len(train.first_of_image)
    return min(round(params.batch_size * captions_per_image), 4096)


class TextPretrainer(Trainer):
    """Pretraining on captions without images, before the usual training of `Trainer`."""

    def __init__(self, *, params: TrainParams, train: CaptionTokens, text: Text, **arguments: Any) -> None:
        """Start with random weights or others, or resume.

        A batch has as many captions as one of usual training. Optimizer and dropout are the same, too, and the learning
        rate follows its schedule over the epochs of pretraining.

        Args:
            params: Architecture and training of the decoder.
            train: Captions of the train split.
            text: Captions without images.
            arguments: The other arguments of `Trainer`.

        Raises:
            UserError: As `Trainer`.
        """
        super().__init__(
            params=replace(
                params,
                batch_size=_text_batch_size(params, train),
                max_epochs=text.params.max_epochs,
                patience=text.params.max_epochs,
                scheduled_sampling=0.0,
                doubly_stochastic_weight=0.0,
            ),
            train=train,
            **arguments,
        )
        self._train_batches = self._make_train_batches(
            text.captions, text.grids, self.params.batch_size, random_views=True
        )

    @property
    def phase(self) -> str:
        """Name of the run in messages."""
        return "train, text"


class JointTrainer(Trainer):
    """Usual training with a batch of captions without images for every batch of images."""

    def __init__(self, *, params: TrainParams, train: CaptionTokens, text: Text, **arguments: Any) -> None:
        """Start with pretrained weights, or resume.

        A batch of text has as many captions as one of images. It continues the epochs of pretraining, and counts
        neither in the training loss nor in the doubly stochastic term. Arguments and errors are those of
        `TextPretrainer`.
        """
        super().__init__(params=params, train=train, **arguments)
        self._text_params = text.params
        batches = self._make_train_batches(
            text.captions, text.grids, _text_batch_size(params, train), random_views=True
        )
        self._text = self._read_text(batches, self.progress.epoch * self.batches_per_epoch + self.progress.batch)
        self._text_replay = GraphedFunction(self._text_backward) if self._replays else None

    def _read_text(self, batches: CaptionBatches, index: int) -> Iterator[Batch]:
        """Yield this process's share of batches of text without end, from the one at `index`."""
        first_epoch, start = divmod(index, len(batches))
        for epoch in count(self._text_params.max_epochs + first_epoch):
            yield from batches.shuffled(
                self.params.seed, epoch, start, rank=self.processes.rank, world_size=self.processes.world_size
            )
            start = 0

    def _accumulate_gradients(
        self, batches: Sequence[Batch], targets: Sequence[Targets], counts: Tensor, log_entropy: bool
    ) -> Tensor:
        """As in `Trainer`, with the gradients of as many batches of text."""
        sums = super()._accumulate_gradients(batches, targets, counts, log_entropy)
        text = list(islice(self._text, len(batches)))
        text_counts = self._count([batch.tokens for batch in text])
        backward = self._text_replay or self._text_backward
        for index, batch in enumerate(text):
            with self._grad_sync(is_last=index == len(text) - 1):
                backward(batch.grids, batch.tokens[:, :, :-1], batch.tokens[:, :, 1:], text_counts)
        return sums

    def _text_backward(self, grids: Tensor, inputs: Tensor, ids: Tensor, counts: Tensor) -> Tensor:
        """Add the gradients of a batch of text to those of the weights, and return its share of the loss.

        Args:
            grids: Pseudo-grids [B, R, C].
            inputs: Ids to read [B, 1, T].
            ids: Ids of the next words [B, 1, T].
            counts: Number of words and captions of the step's text, over all processes [2].
        """
        with self._autocast():
            outputs, alpha = self._model(grids, inputs, with_logits=False)  # [B, 1, T, O], [B, 1, T, R]
            loss = self._loss(outputs, alpha, ids, None)
        total = self._text_params.joint_weight * loss.total(counts, 0.0)
        # As in `_backward`.
        (total * self.processes.world_size).backward()  # type: ignore[no-untyped-call]
        return total.detach()
