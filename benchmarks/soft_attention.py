"""The decoder of tutorials: soft attention (Xu et al. 2015, arXiv:1502.03044), trained by the settings they share.

Attention, embedding and state of 512, Adam at 4e-4, batches of 32 captions, dropout of 0.5 before the vocabulary, the
doubly stochastic term with weight 1 (a sum over regions, a mean over captions), teacher forcing, 14 epochs. The last
epoch's weights are kept: nothing is chosen on validation photographs.

What does not depend on the state is computed once a caption, and energies by the project's own kernel, which changes
rounding and not the mathematics.

Shapes: `B` images, `K` captions an image (or beams), `T` words, `P` regions, `C` channels, `V` words known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.captions.tokens import CaptionTokens
from pipeline.captions.vocabulary import PAD, Vocabulary
from pipeline.decoder.additive_scores import additive_scores
from pipeline.features.store import FeatureStore
from pipeline.generation.search import SearchParams, search, select_beams

SEARCH = replace(SearchParams.greedy(max_length=50), beam_size=5)
"""Captions are ranked by their log-probability, whatever their length."""
_IMAGES_A_SEARCH = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the textbook's decoder is built and trained."""

    size: int = 512
    """Numbers in attention, embedding and state."""
    learning_rate: float = 4e-4
    captions_a_batch: int = 32
    dropout: float = 0.5
    doubly_stochastic_weight: float = 1.0
    epochs: int = 14
    seed: int = 1


class State(NamedTuple):
    """What the decoder remembers between words, each [B, K, size]."""

    hidden: Tensor
    cell: Tensor


class View(NamedTuple):
    """What the decoder sees, prepared once an image, and remembers."""

    regions: Tensor
    """[B, P, C]"""
    keys: Tensor
    """[B, P, size]"""
    state: State


class SoftAttention(nn.Module):
    """Show, Attend and Tell as tutorials have it."""

    def __init__(self, settings: Settings, channels: int, words: int) -> None:
        super().__init__()
        size = settings.size
        self.key = nn.Linear(channels, size)
        self.query = nn.Linear(size, size)
        self.energy = nn.Linear(size, 1, bias=False)  # softmax takes no notice of a bias
        self.gate = nn.Linear(size, channels)
        self.embedding = nn.Embedding(words, size)
        self.lstm = nn.LSTMCell(size + channels, size)
        self.init_h = nn.Linear(channels, size)
        self.init_c = nn.Linear(channels, size)
        self.dropout = nn.Dropout(settings.dropout)
        self.vocabulary = nn.Linear(size, words)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.vocabulary.weight, -0.1, 0.1)
        nn.init.zeros_(self.vocabulary.bias)

    def start(self, regions: Tensor) -> State:
        """The state before the first word of one caption an image."""
        mean = regions.mean(dim=1, keepdim=True)
        return State(self.init_h(mean), self.init_c(mean))

    def forward(self, regions: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Regions [B, P, C] and one caption an image, ids [B, T]: logits [B, T, V] and attention [B, T, P]."""
        keys, state = self.key(regions), self.start(regions)
        hiddens, attentions = [], []
        for embedded in self.embedding(words).unsqueeze(1).unbind(dim=2):
            state, attention = self._advance(embedded, state, regions, keys)
            hiddens.append(state.hidden)
            attentions.append(attention)
        return self.vocabulary(self.dropout(torch.cat(hiddens, dim=1))), torch.cat(attentions, dim=1)

    @torch.inference_mode()
    def caption(self, regions: Tensor, words: Sequence[str]) -> list[tuple[str, ...]]:
        """The words of each image's best caption."""
        view = View(regions, self.key(regions), self.start(regions))
        found = search(self, view, range(len(regions)), SEARCH, words, regions.device)
        return [best.words for best, *_ in found]

    def step(self, words: Tensor, view: "View") -> tuple[Tensor, "View", Tensor]:
        """One word of a search: ids [B, K] to logits [B, K, V], the next view and attention [B, K, P]."""
        state, attention = self._advance(self.embedding(words), view.state, view.regions, view.keys)
        return self.vocabulary(state.hidden), view._replace(state=state), attention

    def select_beams(self, view: "View", beams: Tensor) -> "View":
        return view._replace(state=State(*(select_beams(values, beams) for values in view.state)))

    def select_images(self, view: "View", images: Tensor) -> "View":
        return View(view.regions[images], view.keys[images], State(*(values[images] for values in view.state)))

    def _advance(self, embedded: Tensor, state: State, regions: Tensor, keys: Tensor) -> tuple[State, Tensor]:
        attention = additive_scores(keys, self.query(state.hidden), self.energy.weight[0]).softmax(dim=-1)  # [B, K, P]
        context = self.gate(state.hidden).sigmoid() * (attention @ regions)  # [B, K, C]
        read = torch.cat([embedded, context], dim=-1).flatten(0, 1)
        hidden, cell = self.lstm(read, (state.hidden.flatten(0, 1), state.cell.flatten(0, 1)))
        return State(hidden.view_as(state.hidden), cell.view_as(state.cell)), attention


def train(
    settings: Settings, captions: CaptionTokens, store: FeatureStore, vocabulary: Vocabulary, device: torch.device
) -> SoftAttention:
    """Train on all captions, in a new random order each epoch; the decoder is then in evaluation mode."""
    torch.manual_seed(settings.seed)
    decoder = SoftAttention(settings, store.channels, len(vocabulary)).to(device).train()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=settings.learning_rate)
    image_ids, image = np.unique(captions.image_id, return_inverse=True)
    grids = torch.from_numpy(store.grids(image_ids.tolist()))
    tokens = torch.from_numpy(captions.tokens).long()
    length, place = torch.from_numpy(captions.length), torch.from_numpy(image)
    for _ in range(settings.epochs):
        for rows in torch.split(torch.randperm(len(tokens)), settings.captions_a_batch):
            ids = tokens[rows, : length[rows].max()].to(device)
            logits, attention = decoder(grids[place[rows]].to(device).float(), ids[:, :-1])
            loss = caption_loss(logits, attention, ids[:, 1:], settings.doubly_stochastic_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return decoder.eval()


def caption_loss(logits: Tensor, attention: Tensor, targets: Tensor, doubly_stochastic_weight: float) -> Tensor:
    """Cross-entropy a word, and the sum over regions of (1 - attention summed over words) squared a caption."""
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)
    received = (attention * (targets != PAD).unsqueeze(-1)).sum(dim=1)  # [B, P]
    return cross_entropy + doubly_stochastic_weight * (1 - received).square().sum(dim=-1).mean()


def generate(
    decoder: SoftAttention, vocabulary: Vocabulary, store: FeatureStore, image_ids: Sequence[int], device: torch.device
) -> dict[int, list[str]]:
    """The words of each image's best caption by beam search."""
    found = {}
    for start in range(0, len(image_ids), _IMAGES_A_SEARCH):
        part = image_ids[start : start + _IMAGES_A_SEARCH]
        regions = torch.from_numpy(store.grids(part)).to(device).float()
        for image_id, caption in zip(part, decoder.caption(regions, vocabulary.words), strict=True):
            found[image_id] = list(caption)
    return found
