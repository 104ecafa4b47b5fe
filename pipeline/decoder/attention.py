"""The decoder of Show, Attend and Tell (Xu et al. 2015, arXiv:1502.03044), with soft attention.

Shapes: `B` images, `K` captions an image (or beams), `T` words, `P` regions, `C` channels, `V` words known,
`A` attention, `E` embedding, `H` state.

One `step` looks at the regions and predicts one word. Training runs the same weights through `forward`, which takes out
of the loop over words whatever does not depend on the state: region keys, the words' share of the gates and the
vocabulary product. The captions of an image share its regions and keys.
"""

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.decoder.energy import compiled_energies, energies
from pipeline.decoder.recurrence import LoopedLinear
from pipeline.params import section


@section
class DecoderParams:
    """Sizes of the decoder."""

    embedding: Annotated[int, Field(ge=1)]
    """Numbers that stand for a word, and width of the layer before the vocabulary."""
    state: Annotated[int, Field(ge=1)]
    """Numbers in the LSTM's hidden state, and in its cell."""
    attention: Annotated[int, Field(ge=1)]
    """Numbers in which the state and a region are compared."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Share of numbers zeroed in training, in embedded words and before the vocabulary."""
    region_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Share of regions that are blanked in training."""
    word_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Share of words hidden from the decoder in training, so that it looks at the picture rather than guesses from
    the word before."""


PLACE_CHANNELS = 16


def places(height: int, width: int) -> Tensor:
    """Describe where each region of a grid lies: [P, 16].

    Sines and cosines of x and y, between 0 and 1, at 1/4, 1/2, 1 and 2 periods a picture (after Vaswani et al. 2017;
    in two dimensions as in Carion et al. 2020).
    """
    x = ((torch.arange(width) + 0.5) / width).expand(height, width)
    y = ((torch.arange(height) + 0.5) / height).unsqueeze(1).expand(height, width)
    turns = torch.stack([x, y], dim=-1).reshape(-1, 2, 1) * torch.tensor([0.25, 0.5, 1.0, 2.0])  # [P, 2, 4]
    return torch.cat([(2 * math.pi * turns).sin(), (2 * math.pi * turns).cos()], dim=-1).flatten(1)


class Regions(NamedTuple):
    """What the decoder may look at, prepared once an image."""

    values: Tensor
    """[B, P, C + 16]: the grid, normalised over channels, and each region's place."""
    keys: Tensor
    """[B, P, A]"""


class State(NamedTuple):
    """What the decoder remembers between words."""

    hidden: Tensor
    """[B, K, H]"""
    cell: Tensor
    """[B, K, H]"""
    seen: Tensor
    """[B, K, P], the attention of all words so far, summed."""


class AttentionDecoder(nn.Module):
    """An LSTM that chooses, before each word, where to look.

    Differs from the paper in five points: where to look depends on the last word, not on the state before it alone,
    since five people word one picture in five ways; regions are layer-normalised over channels, which removes the
    scale of the encoder's activations; each region is told its place, without which left and right look alike; the
    state chooses how much to seek or shun what was looked at before (a coverage, after Tu et al. 2016), without which
    things are named twice; and the energies come from a rectifier in place of a hyperbolic tangent.
    """

    places: Tensor

    def __init__(self, params: DecoderParams, grid: tuple[int, int], channels: int, words: int) -> None:
        super().__init__()
        self.register_buffer("places", places(*grid), persistent=False)
        self._channels = channels
        self.compiled = False
        channels += PLACE_CHANNELS
        self._sizes = [params.attention, 1, 1, 4 * params.state]
        self.key = nn.Linear(channels, params.attention)
        self.energy = nn.Parameter(torch.empty(params.attention).uniform_(-1, 1) / params.attention**0.5)
        self.first_hidden = nn.Linear(channels, params.state)
        self.first_cell = nn.Linear(channels, params.state)
        self.embedding = nn.Embedding(words, params.embedding)
        self.from_word = nn.Linear(params.embedding, sum(self._sizes), bias=False)
        self.context_gates = nn.Linear(channels, 4 * params.state, bias=False)
        self.from_state = nn.Linear(params.state, sum(self._sizes))
        self.state_output = nn.Linear(params.state, params.embedding)
        self.context_output = nn.Linear(channels, params.embedding, bias=False)
        self.vocabulary = nn.Linear(params.embedding, words)
        self.dropout = nn.Dropout(params.dropout)
        self.word_dropout = nn.Dropout(params.word_dropout)
        self.region_dropout = nn.Dropout(params.region_dropout)

    def look(self, grids: Tensor) -> Regions:
        """Prepare grids [B, P, C] of any float type."""
        normalised = F.layer_norm(grids.to(self.key.weight.dtype), [self._channels])
        normalised = normalised * self.region_dropout(normalised.new_ones(*normalised.shape[:2], 1))
        values = torch.cat([normalised, self.places.expand(len(grids), -1, -1)], dim=-1)
        if torch.is_autocast_enabled(values.device.type):
            # Once an image, not once a word.
            values = values.to(torch.get_autocast_dtype(values.device.type))
        return Regions(values, self.key(values))

    def start(self, regions: Regions, captions: int) -> State:
        """The state before the first word of `captions` captions an image: made from the mean region."""
        mean = regions.values.mean(dim=1, keepdim=True)  # [B, 1, C]
        # In one piece, since a product with an expanded tensor copies the weights for each image.
        hidden = torch.tanh(self.first_hidden(mean)).expand(-1, captions, -1).contiguous()
        cell = torch.tanh(self.first_cell(mean)).expand(-1, captions, -1)
        # What is summed up over words keeps the weights' precision.
        seen = cell.new_zeros(len(mean), captions, regions.values.shape[1], dtype=self.energy.dtype)
        return State(hidden, cell.to(self.energy.dtype), seen)

    def step(self, words: Tensor, state: State, regions: Regions) -> tuple[Tensor, State, Tensor]:
        """Read one word a caption and predict the next.

        Takes ids [B, K]; returns logits [B, K, V], the new state, and the attention [B, K, P], which sums to 1.
        """
        embedded = self._embed(words)
        state, context, attention = self._advance(
            self.from_word(embedded), state, regions, self.from_state, self.context_gates
        )
        return self._logits(embedded, state.hidden, context), state, attention

    def forward(self, grids: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Read whole captions and predict each next word, as `step` would one by one.

        Takes grids [B, P, C] and ids [B, K, T]; returns logits [B, K, T, V] and attention [B, K, T, P].
        """
        regions = self.look(grids)
        state = self.start(regions, words.shape[1])
        embedded = self._embed(words)  # [B, K, T, E]
        rows = words.shape[:2]
        from_state = LoopedLinear(self.from_state, words.shape[2], rows)
        context_gates = LoopedLinear(self.context_gates, words.shape[2], rows)
        hiddens, contexts, attentions = [], [], []
        for from_word in self.from_word(embedded).unbind(dim=2):
            state, context, attention = self._advance(from_word, state, regions, from_state, context_gates)
            hiddens.append(state.hidden)
            contexts.append(context)
            attentions.append(attention)
        logits = self._logits(embedded, torch.stack(hiddens, dim=2), torch.stack(contexts, dim=2))
        return logits, torch.stack(attentions, dim=2)

    def _embed(self, words: Tensor) -> Tensor:
        embedded = self.dropout(self.embedding(words))
        hidden: Tensor = embedded * self.word_dropout(embedded.new_ones(*words.shape, 1))
        return hidden

    def _advance(
        self,
        from_word: Tensor,
        state: State,
        regions: Regions,
        from_state: Callable[[Tensor], Tensor],
        context_gates: Callable[[Tensor], Tensor],
    ) -> tuple[State, Tensor, Tensor]:
        query, gate, return_, gates = torch.split(from_word + from_state(state.hidden), self._sizes, dim=-1)
        compare = compiled_energies if self.compiled else energies
        energy = compare(regions.keys, query, self.energy) + return_ * state.seen
        attention = energy.softmax(dim=-1)  # [B, K, P]
        context = gate.sigmoid() * torch.bmm(attention, regions.values)  # [B, K, C]
        entry, forget, candidate, output = (gates + context_gates(context)).chunk(4, dim=-1)
        cell = forget.sigmoid() * state.cell + entry.sigmoid() * candidate.tanh()
        hidden = output.sigmoid() * cell.tanh()
        return State(hidden, cell, state.seen + attention), context, attention

    def _logits(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        deep = torch.tanh(embedded + self.state_output(hidden) + self.context_output(context))
        logits: Tensor = self.vocabulary(self.dropout(deep))
        return logits
