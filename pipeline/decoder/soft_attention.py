"""The decoder of Show, Attend and Tell (Xu et al. 2015, arXiv:1502.03044), with soft attention.

Shapes: `B` images, `K` captions an image (or beams), `T` words, `P` regions, `C` channels, `V` words known,
`A` attention, `E` embedding, `H` state.

One `step` looks at the regions and predicts one word. Training runs the same weights through `forward`, which takes out
of the loop over words whatever does not depend on the state: region keys, the words' share of the gates and the
vocabulary product. The captions of an image share its regions and keys. Where an image has fewer regions than words,
it is the regions that are multiplied with the weights that read the context, not the context at every word: both are
linear, and the gate between them is one number a word.
"""

import math
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.decoder.additive_scores import additive_scores
from pipeline.decoder.deferred_gradients import DeferredGradients
from pipeline.params import params_section


@params_section
class DecoderParams:
    """Sizes of the decoder."""

    embedding_size: Annotated[int, Field(ge=1)]
    """Numbers that stand for a word, and width of the layer before the vocabulary."""
    hidden_size: Annotated[int, Field(ge=1)]
    """Numbers in the LSTM's hidden state, and in its cell."""
    attention_size: Annotated[int, Field(ge=1)]
    """Numbers in which the state and a region are compared."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Share of numbers zeroed in training, in embedded words and before the vocabulary."""
    region_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Share of regions that are blanked in training."""
    word_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Share of words hidden from the decoder in training, so that it looks at the picture rather than guesses from
    the word before."""


POSITION_CHANNELS = 16


def position_encoding(height: int, width: int) -> Tensor:
    """Describe where each region of a grid lies: [P, 16].

    Sines and cosines of x and y, between 0 and 1, at 1/4, 1/2, 1 and 2 periods a picture (after Vaswani et al. 2017;
    in two dimensions as in Carion et al. 2020).
    """
    x = ((torch.arange(width) + 0.5) / width).expand(height, width)
    y = ((torch.arange(height) + 0.5) / height).unsqueeze(1).expand(height, width)
    turns = torch.stack([x, y], dim=-1).reshape(-1, 2, 1) * torch.tensor([0.25, 0.5, 1.0, 2.0])  # [P, 2, 4]
    return torch.cat([(2 * math.pi * turns).sin(), (2 * math.pi * turns).cos()], dim=-1).flatten(1)


class EncodedImages(NamedTuple):
    """What the decoder may look at, prepared once an image."""

    mean: Tensor
    """[B, 1, C + 16]"""
    keys: Tensor
    """[B, P, A]"""
    values: Tensor | None
    """[B, P, C + 16]: the grid, normalized over channels, and each region's place. None where the products below are
    made already."""
    gates: Tensor
    """What a mean region, or, without values, attention itself is multiplied with for the LSTM's gates: [C + 16, 4H] or
    [B, P, 4H]."""
    output: Tensor
    """The same for the layer before the vocabulary: [C + 16, E] or [B, P, E]."""

    def select_images(self, images: Tensor) -> "EncodedImages":
        """Pick the images numbered [B']."""
        picked = self._replace(mean=self.mean[images], keys=self.keys[images])
        if self.values is None:
            return picked._replace(gates=self.gates[images], output=self.output[images])
        return picked._replace(values=self.values[images])


class DecoderState(NamedTuple):
    """What the decoder remembers between words."""

    hidden: Tensor
    """[B, K, H]"""
    cell: Tensor
    """[B, K, H]"""
    coverage: Tensor
    """[B, K, P], the attention of all words so far, summed."""


class Dropout(nn.Module):
    """`nn.Dropout`, whose random numbers take a tenth of a training step on a CPU, with faster ones."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.p = share

    def forward(self, values: Tensor) -> Tensor:
        """Zero a share of the values, and scale the others so that their sum is expected to stay."""
        if not self.training or not self.p:
            return values
        kept = torch.rand(values.shape, device=values.device) >= self.p
        return values * (kept.to(values.dtype) / (1 - self.p))


class SoftAttentionDecoder(nn.Module):
    """An LSTM that chooses, before each word, where to look.

    Differs from the paper in five points: where to look depends on the last word, not on the state before it alone,
    since five people word one picture in five ways; regions are layer-normalized over channels, which removes the
    scale of the encoder's activations; each region is told its place, without which left and right look alike; the
    state chooses how much to seek or shun what was looked at before (a coverage, after Tu et al. 2016), without which
    things are named twice; and the energies come from a rectifier in place of a hyperbolic tangent.
    """

    position_encoding: Tensor

    def __init__(self, params: DecoderParams, grid: tuple[int, int], channels: int, words: int) -> None:
        super().__init__()
        self.register_buffer("position_encoding", position_encoding(*grid), persistent=False)
        self._channels = channels
        self.compiled = False
        channels += POSITION_CHANNELS
        self._sizes = [params.attention_size, 1, 1, 4 * params.hidden_size]
        self.key = nn.Linear(channels, params.attention_size)
        self.energy = nn.Parameter(torch.empty(params.attention_size).uniform_(-1, 1) / params.attention_size**0.5)
        self.init_h = nn.Linear(channels, params.hidden_size)
        self.init_c = nn.Linear(channels, params.hidden_size)
        self.embedding = nn.Embedding(words, params.embedding_size)
        self.word_proj = nn.Linear(params.embedding_size, sum(self._sizes), bias=False)
        self.context_gates = nn.Linear(channels, 4 * params.hidden_size, bias=False)
        self.state_proj = nn.Linear(params.hidden_size, sum(self._sizes))
        self.state_output = nn.Linear(params.hidden_size, params.embedding_size)
        self.context_output = nn.Linear(channels, params.embedding_size, bias=False)
        self.output_proj = nn.Linear(params.embedding_size, words)
        self.dropout = Dropout(params.dropout)
        self.word_dropout = Dropout(params.word_dropout)
        self.region_dropout = Dropout(params.region_dropout)

    def prepare(self, grids: Tensor, looks: int = 0) -> EncodedImages:
        """Prepare grids [B, P, C] of any float type. `looks` at each are made by all its captions, 0 if unknown."""
        normalized = F.layer_norm(grids.to(self.key.weight.dtype), [self._channels])
        normalized = normalized * self.region_dropout(normalized.new_ones(*normalized.shape[:2], 1))
        values = torch.cat([normalized, self.position_encoding.expand(len(grids), -1, -1)], dim=-1)
        if torch.is_autocast_enabled(values.device.type):
            # Once an image, not once a word.
            values = values.to(torch.get_autocast_dtype(values.device.type))
        mean, keys = values.mean(dim=1, keepdim=True), self.key(values)
        if looks > values.shape[1]:
            return EncodedImages(mean, keys, None, self.context_gates(values), self.context_output(values))
        return EncodedImages(mean, keys, values, self.context_gates.weight.T, self.context_output.weight.T)

    def init_state(self, regions: EncodedImages, captions: int) -> DecoderState:
        """The state before the first word of `captions` captions an image: made from the mean region."""
        # In one piece, since a product with an expanded tensor copies the weights for each image.
        hidden = torch.tanh(self.init_h(regions.mean)).expand(-1, captions, -1).contiguous()
        cell = torch.tanh(self.init_c(regions.mean)).expand(-1, captions, -1)
        # What is summed up over words keeps the weights' precision.
        coverage = cell.new_zeros(len(hidden), captions, regions.keys.shape[1], dtype=self.energy.dtype)
        return DecoderState(hidden, cell.to(self.energy.dtype), coverage)

    def project_vocabulary(self) -> Tensor:
        """What every word asks of the state, [V, A + 2 + 4H]: made once, it saves a search a product at each word."""
        return self._asked(self.embedding.weight)

    def decode_step(
        self, words: Tensor, state: DecoderState, regions: EncodedImages, asked: Tensor | None = None
    ) -> tuple[Tensor, DecoderState, Tensor]:
        """Read one word a caption and predict the next, in evaluation with the help of `read_all`.

        Takes ids [B, K]; returns logits [B, K, V], the new state, and the attention [B, K, P], which sums to 1.
        """
        embedded = self._embed(words)
        asked_by_words = self._asked(embedded) if asked is None else F.embedding(words, asked)
        state, attention, context = self._advance(
            asked_by_words, state, regions, self.state_proj.weight.T, regions.gates
        )
        return self._logits(embedded, state.hidden, context @ regions.output), state, attention

    def forward(self, grids: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Read whole captions and predict each next word, as `step` would one by one.

        Takes grids [B, P, C] and ids [B, K, T]; returns logits [B, K, T, V] and attention [B, K, T, P].
        """
        captions, length = words.shape[1:]
        regions = self.prepare(grids, captions * length)
        state = self.init_state(regions, captions)
        embedded = self._embed(words.permute(2, 0, 1))  # [T, B, K, E]
        loop = DeferredGradients(self._asked(embedded), self.state_proj.weight.T, regions.gates)
        hiddens, contexts, attentions = [], [], []
        for asked in loop.summed:
            before = state.hidden
            state, attention, context = self._advance(asked, state, regions, *loop.matrices)
            loop.multiplied(before, context)
            hiddens.append(state.hidden)
            contexts.append(context)
            attentions.append(attention)
        context = torch.stack(contexts, dim=2).flatten(1, 2) @ regions.output
        embedded = embedded.permute(1, 2, 0, 3)
        logits = self._logits(embedded, torch.stack(hiddens, dim=2), context.view_as(embedded))
        return logits, torch.stack(attentions, dim=2)

    def _embed(self, words: Tensor) -> Tensor:
        embedded = self.dropout(self.embedding(words))
        hidden: Tensor = embedded * self.word_dropout(embedded.new_ones(*words.shape, 1))
        return hidden

    def _asked(self, embedded: Tensor) -> Tensor:
        """The words' and the biases' share of what the state is asked."""
        return F.linear(embedded, self.word_proj.weight, self.state_proj.bias)

    def _advance(
        self, asked: Tensor, state: DecoderState, regions: EncodedImages, state_proj: Tensor, gates_of: Tensor
    ) -> tuple[DecoderState, Tensor, Tensor]:
        """Look and take one step; returns the new state, the attention, and what `regions.output` is to multiply."""
        query, gate, seek, gates = torch.split(asked + state.hidden @ state_proj, self._sizes, dim=-1)
        energy = additive_scores(regions.keys, query, self.energy, self.compiled) + seek * state.coverage
        attention = energy.softmax(dim=-1)  # [B, K, P]
        looked = gate.sigmoid() * attention
        context = looked if regions.values is None else torch.bmm(looked, regions.values)
        entry, forget, candidate, output = (gates + context @ gates_of).chunk(4, dim=-1)
        cell = forget.sigmoid() * state.cell + entry.sigmoid() * candidate.tanh()
        hidden = output.sigmoid() * cell.tanh()
        return DecoderState(hidden, cell, state.coverage + attention), attention, context

    def _logits(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        deep = torch.tanh(embedded + self.state_output(hidden) + context)
        logits: Tensor = self.output_proj(self.dropout(deep))
        return logits
