"""The interface of the decoders, and what all kinds share. Search, training, report and app know only this interface.

`registry.py` lists the kinds.

Shapes:
    B  images
    K  captions per image, or beams
    T  decoding steps
    P  regions
    C  channels of the encoder's grid
    D  size of a region with its position encoding: C + 16
    A  attention size
    E  embedding size
    H  hidden size
    V  vocabulary size
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, Generic, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import TypeVar

from pipeline.decoder.additive_scores import additive_scores
from pipeline.decoder.encoded_images import POSITION_CHANNELS, EncodedImages, position_encoding
from pipeline.decoder.layers import Dropout
from pipeline.decoder.non_local import NonLocalBlock
from pipeline.params import params_section

DecoderKind = Literal["soft_attention", "top_down", "adaptive"]

S = TypeVar("S", bound=tuple[Tensor, ...], default=Any)
"""State between two decoding steps: a NamedTuple of tensors [B, K, ...]."""


@params_section
class DecoderParams:
    """Kind, sizes and dropout of the decoder."""

    kind: DecoderKind
    """Decoder: Show, Attend and Tell (`soft_attention`), two LSTMs with top-down attention (`top_down`), or adaptive
    attention with a visual sentinel (`adaptive`)."""
    embedding_size: Annotated[int, Field(ge=1, le=8192)]
    """Word embedding size; for `soft_attention`, also the size of the layer before the output layer."""
    hidden_size: Annotated[int, Field(ge=1, le=8192)]
    """LSTM hidden size."""
    attention_size: Annotated[int, Field(ge=1, le=8192)]
    """Attention layer size."""
    non_local_size: Annotated[int, Field(ge=0, le=8192)]
    """Size of the non-local block, which adds to each region a sum over similar regions, so that the decoder can count
    alike objects; 0 disables it."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Dropout probability of word embeddings and before the output layer; 0 disables it."""
    region_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Probability of zeroing all channels of a region in training; 0 disables it."""
    word_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Probability of zeroing the embedding of an input word in training; 0 disables it. Makes the decoder rely on the
    image rather than on the previous word."""


class Decoder(nn.Module, ABC, Generic[S]):
    """A decoder that attends to the regions of an image at every step.

    A kind creates its layers in `__init__`, among them `embedding` and `score_weight`, and implements the abstract
    methods.
    """

    embedding: nn.Embedding
    """Word embeddings [V, E]."""
    output_proj: nn.Linear
    """Output layer, to the logits of the vocabulary."""
    score_weight: nn.Parameter
    """Weights of additive attention [A]."""
    position_encoding: Tensor

    def __init__(self, params: DecoderParams, grid_size: tuple[int, int], num_channels: int) -> None:
        """Build the parts that do not depend on the kind.

        Args:
            params: Sizes and dropout.
            grid_size: Height and width of the grid, in regions.
            num_channels: Channels of the grid, C.
        """
        super().__init__()
        self.register_buffer("position_encoding", position_encoding(*grid_size), persistent=False)
        self.compiled = False
        """Whether attention scores use `torch.compile`."""
        self.region_size = num_channels + POSITION_CHANNELS
        """Size of a region with its position encoding, D."""
        self.dropout = Dropout(params.dropout)
        self.word_dropout = Dropout(params.word_dropout)
        self.region_dropout = Dropout(params.region_dropout)
        self.non_local = NonLocalBlock(self.region_size, params.non_local_size) if params.non_local_size else None

    @abstractmethod
    def prepare(self, grids: Tensor, num_steps: int = 0) -> EncodedImages:
        """Compute everything that depends on the images alone.

        Args:
            grids: Grids [B, P, C] of any floating-point type.
            num_steps: Expected decoding steps per image, over all of its captions; 0 if unknown. Results for different
                values are equal up to rounding.
        """

    @abstractmethod
    def init_state(self, images: EncodedImages, num_captions: int) -> S:
        """Compute the state before the first word.

        Args:
            images: Result of `prepare`.
            num_captions: Captions per image, K.
        """

    def decode_step(
        self, tokens: Tensor, state: S, images: EncodedImages, word_projection: Tensor | None = None
    ) -> tuple[Tensor, S, Tensor]:
        """Read one word of each caption and predict the next.

        Args:
            tokens: Ids of the words to read [B, K].
            state: State before the step.
            images: Result of `prepare`.
            word_projection: Result of `project_vocabulary`; None projects the words of this step.

        Returns:
            Logits [B, K, V], the next state, and attention weights alpha [B, K, P]. The weights of a step are at least
            0 and sum to 1; with a visual sentinel they sum to at most 1, and the rest is the weight of the sentinel.
        """
        output, state, alpha = self._step(tokens, state, images, word_projection)
        return self.output_proj(output), state, alpha

    @abstractmethod
    def _step(
        self, tokens: Tensor, state: S, images: EncodedImages, word_projection: Tensor | None
    ) -> tuple[Tensor, S, Tensor]:
        """Return what `decode_step` returns, with the input of the output layer [B, K, -1] instead of logits."""

    def forward(
        self, grids: Tensor, tokens: Tensor, word_projection: Tensor | None = None, with_logits: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Read whole captions and predict every next word, as `decode_step` does one word at a time.

        Args:
            grids: Grids [B, P, C] of any floating-point type.
            tokens: Ids of the words to read [B, K, T].
            word_projection: Result of `project_vocabulary`; None projects the words of these captions.
            with_logits: Whether to apply the output layer. Its results are the largest tensor of all.

        Returns:
            Logits [B, K, T, V], or the inputs of the output layer [B, K, T, -1], and attention weights alpha
            [B, K, T, P].
        """
        outputs, alpha = self._steps(grids, tokens, word_projection)
        return (self.output_proj(outputs) if with_logits else outputs), alpha

    def _steps(self, grids: Tensor, tokens: Tensor, word_projection: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what `forward` returns without logits.

        A kind overrides this method to compute at once what does not depend on the state.
        """
        num_captions, caption_length = tokens.shape[1:]
        images = self.prepare(grids, num_captions * caption_length)
        state = self.init_state(images, num_captions)
        outputs, alphas = [], []
        for words in tokens.unbind(dim=2):
            output, state, alpha = self._step(words, state, images, word_projection)
            outputs.append(output)
            alphas.append(alpha)
        return torch.stack(outputs, dim=2), torch.stack(alphas, dim=2)

    def project_vocabulary(self) -> Tensor:
        """Compute the word projections [V, -1] of the vocabulary, to speed up evaluation mode."""
        return self._project_words(self.embedding.weight)

    @abstractmethod
    def _project_words(self, embedded: Tensor) -> Tensor:
        """Compute what depends on a word alone from word embeddings [..., E]: [..., -1]."""

    def _project_tokens(self, embedded: Tensor, tokens: Tensor, word_projection: Tensor | None) -> Tensor:
        """Return the projections [..., -1] of the words that one or more steps read.

        Args:
            embedded: Word embeddings [..., E].
            tokens: Ids of the words [...].
            word_projection: Result of `project_vocabulary`, or None.
        """
        return self._project_words(embedded) if word_projection is None else F.embedding(tokens, word_projection)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Return word embeddings [..., E] with dropout."""
        embedded: Tensor = self.dropout(self.embedding(tokens))
        masked: Tensor = embedded * self.word_dropout(embedded.new_ones(*tokens.shape, 1))
        return masked

    def _encode_regions(self, grids: Tensor) -> Tensor:
        """Return regions [B, P, D]: grids [B, P, C], layer-normalized, with region dropout and position encoding.

        The non-local block follows, if there is one. Regions of a grid of another size have no position, and get the
        mean position encoding.
        """
        positions = self.position_encoding  # [P, 16]
        if grids.shape[1] != len(positions):
            positions = positions.mean(dim=0).expand(grids.shape[1], -1)
        normalized = F.layer_norm(grids.to(self.position_encoding.dtype), grids.shape[2:])  # [B, P, C]
        normalized = normalized * self.region_dropout(normalized.new_ones(*normalized.shape[:2], 1))
        regions = torch.cat([normalized, positions.expand(len(grids), -1, -1)], dim=-1)  # [B, P, D]
        if self.non_local is not None:
            regions = self.non_local(regions)
        if torch.is_autocast_enabled(regions.device.type):
            # Cast once per image: autocast would do it at every step.
            regions = regions.to(torch.get_autocast_dtype(regions.device.type))
        return regions

    def _zeros(self, images: EncodedImages, num_captions: int, size: int) -> Tensor:
        """Return zeros [B, K, size] for a state that accumulates over steps.

        Under autocast it has the precision of the weights.
        """
        return images.keys.new_zeros(len(images.keys), num_captions, size, dtype=self.position_encoding.dtype)

    def _attention_scores(self, keys: Tensor, query: Tensor, coverage_weight: Tensor, coverage: Tensor) -> Tensor:
        """Compute additive attention scores with coverage (Tu et al. 2016, arXiv:1601.04811).

        Args:
            keys: Keys of the regions [B, P, A].
            query: Queries of the captions [B, K, A].
            coverage_weight: Weight of the coverage at this step [B, K, 1].
            coverage: Sum of the attention weights of all steps so far [B, K, P].

        Returns:
            Scores [B, K, P].
        """
        return additive_scores(keys, query, self.score_weight, self.compiled) + coverage_weight * coverage


def map_state(state: S, function: Callable[[Tensor], Tensor]) -> S:
    """Apply a function to each tensor [B, K, ...] of a state."""
    mapped: S = type(state)(*map(function, state))
    return mapped
