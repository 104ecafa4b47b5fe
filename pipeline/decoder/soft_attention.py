"""The decoder of Show, Attend and Tell (Xu et al. 2015, arXiv:1502.03044) with deterministic soft attention.

Names and equation numbers are those of the paper. `soft_attention_reference.py` is the same model in slow and readable
code.

Shapes:
    B  images
    K  captions per image, or beams
    T  decoding steps
    P  regions (L in the paper)
    C  channels of the encoder's grid
    D  size of a region with its position encoding: C + 16
    A  attention size
    E  embedding size
    H  hidden size
    V  vocabulary size
    G  size of the joint projection to query, beta, coverage weight and LSTM gates: A + 2 + 4H
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
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
    """Sizes and dropout of the decoder."""

    embedding_size: Annotated[int, Field(ge=1, le=8192)]
    """Word embedding size, also the size of the layer before the output layer."""
    hidden_size: Annotated[int, Field(ge=1, le=8192)]
    """LSTM hidden size."""
    attention_size: Annotated[int, Field(ge=1, le=8192)]
    """Attention layer size."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Dropout probability of word embeddings and before the output layer; 0 disables it."""
    region_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Probability of zeroing all channels of a region in training; 0 disables it."""
    word_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Probability of zeroing the embedding of an input word in training; 0 disables it. Makes the decoder rely on the
    image rather than on the previous word."""


POSITION_CHANNELS = 16
"""Size of the position encoding of a region."""


def position_encoding(height: int, width: int) -> Tensor:
    """Encode the position of each region of a grid as sines and cosines of its x and y coordinates.

    The wavelengths are 4, 2, 1 and 1/2 times the side of the grid (after Vaswani et al. 2017; in two dimensions as in
    Carion et al. 2020).

    Args:
        height: Height of the grid, in regions.
        width: Width of the grid, in regions.

    Returns:
        Position encoding [P, 16] of the regions in row-major order.
    """
    x = ((torch.arange(width) + 0.5) / width).expand(height, width)
    y = ((torch.arange(height) + 0.5) / height).unsqueeze(1).expand(height, width)
    frequencies = torch.tensor([0.25, 0.5, 1.0, 2.0])  # cycles per side
    cycles = torch.stack([x, y], dim=-1).reshape(-1, 2, 1) * frequencies  # [P, 2, 4]
    return torch.cat([(2 * math.pi * cycles).sin(), (2 * math.pi * cycles).cos()], dim=-1).flatten(1)  # [P, 16]


@dataclass(frozen=True)
class EncodedImages(ABC):
    """Images prepared for decoding, from `SoftAttentionDecoder.prepare`.

    A context vector is a weighted sum of regions, and the LSTM and the output layer project it linearly. The subclasses
    differ in the order of sum and projection:

    - `RegionFeatures` sums first, `(beta * alpha @ regions) @ weight`, at every step.
    - `ProjectedRegions` projects first, `beta * alpha @ (regions @ weight)`, with the second product computed once per
      image. This is faster for images with fewer regions than decoding steps.
    """

    mean: Tensor
    """Mean region [B, 1, D]."""
    keys: Tensor
    """Attention keys of the regions [B, P, A]."""

    @abstractmethod
    def attend(self, gated_alpha: Tensor) -> Tensor:
        """Apply the gated attention weights, beta * alpha [B, K, P]; `context_weights` project the result."""

    @abstractmethod
    def context_weights(self, decoder: "SoftAttentionDecoder") -> tuple[Tensor, Tensor]:
        """Return two matrices, which project the result of `attend` to the LSTM gates and to the deep output."""

    @abstractmethod
    def select_images(self, index: Tensor) -> "EncodedImages":
        """Return the images at indices [B']."""


@dataclass(frozen=True)
class RegionFeatures(EncodedImages):
    """Images whose context vectors are computed at every step."""

    regions: Tensor
    """Layer-normalized grid with position encoding [B, P, D]."""

    def attend(self, gated_alpha: Tensor) -> Tensor:
        """Return the context vectors [B, K, D] (eq. 13)."""
        return torch.bmm(gated_alpha, self.regions)

    def context_weights(self, decoder: "SoftAttentionDecoder") -> tuple[Tensor, Tensor]:
        """Return the decoder's weights for context vectors [D, 4H] and [D, E]."""
        return decoder.context_proj.weight.T, decoder.context_output.weight.T

    def select_images(self, index: Tensor) -> "RegionFeatures":
        """Return the images at indices [B']."""
        return RegionFeatures(self.mean[index], self.keys[index], self.regions[index])


@dataclass(frozen=True)
class ProjectedRegions(EncodedImages):
    """Images whose regions are projected once, so that no context vector is ever computed."""

    region_gates: Tensor
    """Regions projected to the LSTM gates [B, P, 4H]."""
    region_output: Tensor
    """Regions projected to the deep output [B, P, E]."""

    def attend(self, gated_alpha: Tensor) -> Tensor:
        """Return `gated_alpha` [B, K, P]: the products with the projected regions include the weighted sum."""
        return gated_alpha

    def context_weights(self, decoder: "SoftAttentionDecoder") -> tuple[Tensor, Tensor]:
        """Return the projected regions [B, P, 4H] and [B, P, E]."""
        return self.region_gates, self.region_output

    def select_images(self, index: Tensor) -> "ProjectedRegions":
        """Return the images at indices [B']."""
        return ProjectedRegions(self.mean[index], self.keys[index], self.region_gates[index], self.region_output[index])


class DecoderState(NamedTuple):
    """Recurrent state between two decoding steps."""

    h: Tensor
    """Hidden state [B, K, H]."""
    c: Tensor
    """Cell state [B, K, H]."""
    coverage: Tensor
    """Sum of the attention weights of all steps so far [B, K, P]."""


class Dropout(nn.Module):
    """Dropout whose mask is cheaper to draw on a CPU than that of `nn.Dropout`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        """Probability of zeroing a value."""

    def forward(self, values: Tensor) -> Tensor:
        """Zero values with probability `p` and scale the others by 1 / (1 - p); in evaluation mode, change nothing."""
        if not self.training or not self.p:
            return values
        mask = torch.rand(values.shape, device=values.device) >= self.p
        return values * (mask.to(values.dtype) / (1 - self.p))


class SoftAttentionDecoder(nn.Module):
    """LSTM decoder with soft attention over image regions.

    It differs from the paper in five points:

    1. Attention and beta depend on the previous word as well as on h, which has not read that word yet. One image has
       many captions, and the previous word narrows them down.
    2. Regions are layer-normalized over channels, which removes the scale of the encoder's activations.
    3. Regions carry a position encoding, without which left and right are indistinguishable.
    4. The coverage, times a weight that the decoder predicts at every step, is added to the attention scores (after Tu
       et al. 2016). Without it, captions name objects twice.
    5. Attention scores use ReLU instead of tanh.
    """

    position_encoding: Tensor

    def __init__(self, params: DecoderParams, grid_size: tuple[int, int], num_channels: int, vocab_size: int) -> None:
        """Build a decoder with random weights.

        Args:
            params: Sizes and dropout.
            grid_size: Height and width of the grid, in regions.
            num_channels: Channels of the grid, C.
            vocab_size: Vocabulary size, V.
        """
        super().__init__()
        attention_size, embedding_size, hidden_size = params.attention_size, params.embedding_size, params.hidden_size
        region_size = num_channels + POSITION_CHANNELS  # D
        self.register_buffer("position_encoding", position_encoding(*grid_size), persistent=False)
        self.compiled = False
        """Whether attention scores use `torch.compile`."""
        self._num_channels = num_channels
        self._split_sizes = [attention_size, 1, 1, 4 * hidden_size]  # query, beta, coverage weight, LSTM gates
        self.key_proj = nn.Linear(region_size, attention_size)
        self.score_weight = nn.Parameter(torch.empty(attention_size).uniform_(-1, 1) / attention_size**0.5)
        self.init_h = nn.Linear(region_size, hidden_size)
        self.init_c = nn.Linear(region_size, hidden_size)
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.word_proj = nn.Linear(embedding_size, sum(self._split_sizes), bias=False)
        self.context_proj = nn.Linear(region_size, 4 * hidden_size, bias=False)
        self.state_proj = nn.Linear(hidden_size, sum(self._split_sizes))
        self.state_output = nn.Linear(hidden_size, embedding_size)  # L_h
        self.context_output = nn.Linear(region_size, embedding_size, bias=False)  # L_z
        self.output_proj = nn.Linear(embedding_size, vocab_size)  # L_o
        self.dropout = Dropout(params.dropout)
        self.word_dropout = Dropout(params.word_dropout)
        self.region_dropout = Dropout(params.region_dropout)

    def prepare(self, grids: Tensor, num_steps: int = 0) -> EncodedImages:
        """Compute everything that depends on the images alone.

        Args:
            grids: Grids [B, P, C] of any floating-point type.
            num_steps: Expected decoding steps per image, over all of its captions; 0 if unknown. Results for different
                values are equal up to rounding.

        Returns:
            `ProjectedRegions` for images with fewer regions than decoding steps, else `RegionFeatures`.
        """
        normalized = F.layer_norm(grids.to(self.key_proj.weight.dtype), [self._num_channels])  # [B, P, C]
        normalized = normalized * self.region_dropout(normalized.new_ones(*normalized.shape[:2], 1))
        regions = torch.cat([normalized, self.position_encoding.expand(len(grids), -1, -1)], dim=-1)  # [B, P, D]
        if torch.is_autocast_enabled(regions.device.type):
            # Cast once per image: autocast would do it at every step.
            regions = regions.to(torch.get_autocast_dtype(regions.device.type))
        mean, keys = regions.mean(dim=1, keepdim=True), self.key_proj(regions)  # [B, 1, D], [B, P, A]
        if num_steps > regions.shape[1]:
            return ProjectedRegions(mean, keys, self.context_proj(regions), self.context_output(regions))
        return RegionFeatures(mean, keys, regions)

    def init_state(self, images: EncodedImages, num_captions: int) -> DecoderState:
        """Compute the state before the first word from the mean region.

        Args:
            images: Result of `prepare`.
            num_captions: Captions per image, K.
        """
        # Contiguous, as a product with an expanded tensor would copy the weights for each image.
        h = torch.tanh(self.init_h(images.mean)).expand(-1, num_captions, -1).contiguous()  # [B, K, H]
        c = torch.tanh(self.init_c(images.mean)).expand(-1, num_captions, -1)  # [B, K, H]
        # Under autocast, c and coverage keep the precision of the weights, since they accumulate over steps.
        dtype = self.score_weight.dtype
        coverage = c.new_zeros(len(h), num_captions, images.keys.shape[1], dtype=dtype)  # [B, K, P]
        return DecoderState(h, c.to(dtype), coverage)

    def project_vocabulary(self) -> Tensor:
        """Compute the word projections [V, G] of the whole vocabulary, to speed up `decode_step` in evaluation mode."""
        return self._project_words(self.embedding.weight)

    def decode_step(
        self, tokens: Tensor, state: DecoderState, images: EncodedImages, word_projection: Tensor | None = None
    ) -> tuple[Tensor, DecoderState, Tensor]:
        """Read one word of each caption and predict the next.

        Args:
            tokens: Ids of the words to read [B, K].
            state: State before the step.
            images: Result of `prepare`.
            word_projection: Result of `project_vocabulary` [V, G]; None projects the words of this step.

        Returns:
            Logits [B, K, V], the next state, and attention weights alpha [B, K, P], which sum to 1.
        """
        embedded = self._embed(tokens)  # [B, K, E]
        projected = (
            self._project_words(embedded) if word_projection is None else F.embedding(tokens, word_projection)
        )  # [B, K, G]
        gate_weight, output_weight = images.context_weights(self)
        state, alpha, attended = self._recurrent_step(projected, state, images, self.state_proj.weight.T, gate_weight)
        return self._logits(embedded, state.h, attended @ output_weight), state, alpha

    def forward(self, grids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read whole captions and predict every next word, as `decode_step` does one word at a time.

        Everything that does not depend on the recurrent state is computed outside of the loop over steps.

        Args:
            grids: Grids [B, P, C] of any floating-point type.
            tokens: Ids of the words to read [B, K, T].

        Returns:
            Logits [B, K, T, V] and attention weights alpha [B, K, T, P].
        """
        num_captions, caption_length = tokens.shape[1:]
        images = self.prepare(grids, num_captions * caption_length)
        state = self.init_state(images, num_captions)
        embedded = self._embed(tokens.permute(2, 0, 1))  # [T, B, K, E]
        gate_weight, output_weight = images.context_weights(self)
        loop = DeferredGradients(self._project_words(embedded), self.state_proj.weight.T, gate_weight)
        hs, alphas, attended_steps = [], [], []
        for word_projection in loop.steps():  # [B, K, G]
            previous_h = state.h
            state, alpha, attended = self._recurrent_step(word_projection, state, images, *loop.weights)
            loop.record(previous_h, attended)
            hs.append(state.h)
            alphas.append(alpha)
            attended_steps.append(attended)
        context_term = torch.stack(attended_steps, dim=2).flatten(1, 2) @ output_weight  # [B, K * T, E]
        embedded = embedded.permute(1, 2, 0, 3)  # [B, K, T, E]
        logits = self._logits(embedded, torch.stack(hs, dim=2), context_term.view_as(embedded))  # [B, K, T, V]
        return logits, torch.stack(alphas, dim=2)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Return word embeddings [..., E] with dropout."""
        embedded = self.dropout(self.embedding(tokens))
        masked: Tensor = embedded * self.word_dropout(embedded.new_ones(*tokens.shape, 1))
        return masked

    def _project_words(self, embedded: Tensor) -> Tensor:
        """Project word embeddings [..., E] and add the bias of the joint projection: [..., G]."""
        return F.linear(embedded, self.word_proj.weight, self.state_proj.bias)

    def _recurrent_step(
        self,
        word_projection: Tensor,
        state: DecoderState,
        images: EncodedImages,
        state_weight: Tensor,
        gate_weight: Tensor,
    ) -> tuple[DecoderState, Tensor, Tensor]:
        """Compute attention and the next LSTM state.

        Args:
            word_projection: Result of `_project_words` [B, K, G].
            state: State before the step.
            images: Result of `prepare`.
            state_weight: Transposed weight of `state_proj` [H, G].
            gate_weight: First of `images.context_weights`.

        Returns:
            The next state, alpha [B, K, P], and the result of `images.attend`.
        """
        projected = word_projection + state.h @ state_weight  # [B, K, G]
        query, beta_logit, coverage_weight, gates = torch.split(projected, self._split_sizes, dim=-1)
        scores = additive_scores(images.keys, query, self.score_weight, self.compiled)  # [B, K, P], eq. 4
        alpha = (scores + coverage_weight * state.coverage).softmax(dim=-1)  # [B, K, P], eq. 5
        gated_alpha = beta_logit.sigmoid() * alpha  # [B, K, P]
        attended = images.attend(gated_alpha)  # [B, K, D] or [B, K, P], eq. 13
        gates = gates + attended @ gate_weight  # [B, K, 4H], eq. 1
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=-1)  # [B, K, H] each
        c = forget_gate.sigmoid() * state.c + input_gate.sigmoid() * candidate.tanh()  # [B, K, H], eq. 2
        h = output_gate.sigmoid() * c.tanh()  # [B, K, H], eq. 3
        return DecoderState(h, c, state.coverage + alpha), alpha, attended

    def _logits(self, embedded: Tensor, h: Tensor, context_term: Tensor) -> Tensor:
        """Compute logits [..., V] from word embeddings [..., E], h [..., H] and L_z times context [..., E] (eq. 7)."""
        deep_output = torch.tanh(embedded + self.state_output(h) + context_term)  # [..., E]
        logits: Tensor = self.output_proj(self.dropout(deep_output))
        return logits
