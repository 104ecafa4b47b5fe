"""Baseline decoder: soft attention (Xu et al. 2015, arXiv:1502.03044) as tutorials implement and train it.

Attention, embedding and hidden size of 512, Adam with a learning rate of 4e-4, batches of 32 captions, dropout of 0.5
before the output layer, doubly stochastic attention with weight 1 (sum over regions, mean over captions), teacher
forcing, 14 epochs. The weights of the last epoch are used, without selection by a validation score.

Two computations are faster than in tutorials and change the results by rounding only: keys are computed once per image,
and attention scores use `pipeline.decoder.additive_scores`.

Shapes: `B` images, `K` captions per image (or beams), `T` words, `P` regions, `C` channels, `H` attention,
embedding and hidden size, `V` vocabulary size.
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
"""Beam search without length normalization."""
_SEARCH_BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Size and training of the baseline decoder."""

    size: int = 512
    """Attention, embedding and hidden size."""
    learning_rate: float = 4e-4
    batch_size: int = 32
    """Captions per training step."""
    dropout: float = 0.5
    doubly_stochastic_weight: float = 1.0
    num_epochs: int = 14
    seed: int = 1
    compile: bool = False
    """Compile the attention scores in training; needs g++."""


class State(NamedTuple):
    """Recurrent state between two decoding steps, each [B, K, H]."""

    h: Tensor
    c: Tensor


class SearchState(NamedTuple):
    """State of beam search: the images and the recurrent state."""

    regions: Tensor
    """Grids [B, P, C]."""
    keys: Tensor
    """Attention keys [B, P, H]."""
    state: State


class SoftAttention(nn.Module):
    """Show, Attend and Tell as tutorials implement it. Equation numbers are those of the paper."""

    def __init__(self, settings: Settings, num_channels: int, vocab_size: int) -> None:
        super().__init__()
        size = settings.size
        self.compile_scores = settings.compile
        self.key_proj = nn.Linear(num_channels, size)
        self.query_proj = nn.Linear(size, size)
        self.score_proj = nn.Linear(size, 1, bias=False)  # softmax ignores a bias
        self.f_beta = nn.Linear(size, num_channels)
        self.embedding = nn.Embedding(vocab_size, size)
        self.lstm = nn.LSTMCell(size + num_channels, size)
        self.init_h = nn.Linear(num_channels, size)
        self.init_c = nn.Linear(num_channels, size)
        self.dropout = nn.Dropout(settings.dropout)
        self.output_proj = nn.Linear(size, vocab_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.output_proj.weight, -0.1, 0.1)
        nn.init.zeros_(self.output_proj.bias)

    def init_state(self, regions: Tensor) -> State:
        """Compute the state before the first word of one caption per image."""
        mean = regions.mean(dim=1, keepdim=True)  # [B, 1, C]
        return State(self.init_h(mean), self.init_c(mean))

    def forward(self, regions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read one caption per image and predict every next word.

        Args:
            regions: Grids [B, P, C].
            tokens: Ids of the words to read [B, T].

        Returns:
            Logits [B, T, V] and attention weights alpha [B, T, P].
        """
        keys, state = self.key_proj(regions), self.init_state(regions)
        hs, alphas = [], []
        for embedded in self.embedding(tokens).unsqueeze(1).unbind(dim=2):  # [B, 1, H]
            state, alpha = self._recurrent_step(embedded, state, regions, keys)
            hs.append(state.h)
            alphas.append(alpha)
        return self.output_proj(self.dropout(torch.cat(hs, dim=1))), torch.cat(alphas, dim=1)

    @torch.inference_mode()
    def caption(self, regions: Tensor, words: Sequence[str], params: SearchParams) -> list[tuple[str, ...]]:
        """Return the words of the best caption of each image."""
        start = SearchState(regions, self.key_proj(regions), self.init_state(regions))
        captions = search(self, start, range(len(regions)), params, words, regions.device)
        return [best.words for best, *_ in captions]

    def step(self, tokens: Tensor, search_state: SearchState) -> tuple[Tensor, SearchState, Tensor]:
        """Decode one step of a search: tokens [B, K] to logits [B, K, V], the next state and alpha [B, K, P]."""
        embedded = self.embedding(tokens)  # [B, K, H]
        state, alpha = self._recurrent_step(embedded, search_state.state, search_state.regions, search_state.keys)
        return self.output_proj(state.h), search_state._replace(state=state), alpha

    def select_beams(self, search_state: SearchState, beam_index: Tensor) -> SearchState:
        """Return the state of the beams [B, K'] of each image."""
        return search_state._replace(state=State(*(select_beams(values, beam_index) for values in search_state.state)))

    def select_images(self, search_state: SearchState, image_index: Tensor) -> SearchState:
        """Return the state of the images [B']."""
        return SearchState(
            search_state.regions[image_index],
            search_state.keys[image_index],
            State(*(values[image_index] for values in search_state.state)),
        )

    def _recurrent_step(self, embedded: Tensor, state: State, regions: Tensor, keys: Tensor) -> tuple[State, Tensor]:
        query, compiled = self.query_proj(state.h), self.compile_scores and self.training
        scores = additive_scores(keys, query, self.score_proj.weight[0], compiled)  # [B, K, P], eq. 4
        alpha = scores.softmax(dim=-1)  # [B, K, P], eq. 5
        beta = self.f_beta(state.h).sigmoid()  # [B, K, C]
        context = beta * (alpha @ regions)  # [B, K, C], eq. 13 with beta
        inputs = torch.cat([embedded, context], dim=-1).flatten(0, 1)  # [B * K, H + C]
        h, c = self.lstm(inputs, (state.h.flatten(0, 1), state.c.flatten(0, 1)))  # [B * K, H] each, eqs. 1-3
        return State(h.view_as(state.h), c.view_as(state.c)), alpha


def train(
    settings: Settings, captions: CaptionTokens, store: FeatureStore, vocabulary: Vocabulary, device: torch.device
) -> SoftAttention:
    """Train a decoder on all captions, shuffled every epoch, and return it in evaluation mode."""
    torch.manual_seed(settings.seed)
    decoder = SoftAttention(settings, store.channels, len(vocabulary)).to(device).train()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=settings.learning_rate)
    image_ids, image_index = np.unique(captions.image_id, return_inverse=True)
    grids = torch.from_numpy(store.grids(image_ids.tolist()))
    grid_index = torch.from_numpy(image_index)
    for _ in range(settings.num_epochs):
        for rows in torch.split(torch.randperm(len(image_index)), settings.batch_size):
            batch = torch.from_numpy(captions.padded(rows.numpy())).long().to(device)
            logits, alpha = decoder(grids[grid_index[rows]].to(device).float(), batch[:, :-1])
            loss = caption_loss(logits, alpha, batch[:, 1:], settings.doubly_stochastic_weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return decoder.eval()


def caption_loss(logits: Tensor, alpha: Tensor, targets: Tensor, doubly_stochastic_weight: float) -> Tensor:
    """Compute the mean cross-entropy per word plus the doubly stochastic attention term per caption (eq. 14)."""
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)
    alpha_sum = (alpha * (targets != PAD).unsqueeze(-1)).sum(dim=1)  # [B, P]
    return cross_entropy + doubly_stochastic_weight * (1 - alpha_sum).square().sum(dim=-1).mean()


def generate(
    decoder: SoftAttention,
    vocabulary: Vocabulary,
    store: FeatureStore,
    image_ids: Sequence[int],
    params: SearchParams,
    device: torch.device,
) -> dict[int, list[str]]:
    """Generate the best caption of each image by beam search, as words."""
    captions = {}
    for start in range(0, len(image_ids), _SEARCH_BATCH_SIZE):
        batch = image_ids[start : start + _SEARCH_BATCH_SIZE]
        regions = torch.from_numpy(store.grids(batch)).to(device).float()
        for image_id, words in zip(batch, decoder.caption(regions, vocabulary.words, params), strict=True):
            captions[image_id] = list(words)
    return captions
