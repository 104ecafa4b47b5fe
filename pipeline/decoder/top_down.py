"""The two-LSTM decoder with top-down attention (Anderson et al. 2018, arXiv:1707.07998).

Names and equation numbers are those of the paper. `top_down_reference.py` is the same model in slow and readable code.

Shapes are those of `decoder.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.decoder.decoder import Decoder, DecoderParams
from pipeline.decoder.deferred_gradients import DeferredGradients
from pipeline.decoder.encoded_images import EncodedImages, encode_images
from pipeline.decoder.layers import lstm_step


class TopDownState(NamedTuple):
    """Recurrent state between two decoding steps."""

    h1: Tensor
    """Hidden state of the attention LSTM [B, K, H]."""
    c1: Tensor
    """Cell state of the attention LSTM [B, K, H]."""
    h2: Tensor
    """Hidden state of the language LSTM [B, K, H]."""
    c2: Tensor
    """Cell state of the language LSTM [B, K, H]."""
    coverage: Tensor
    """Sum of the attention weights of all steps so far [B, K, P]."""


class TopDownDecoder(Decoder[TopDownState]):
    """An attention LSTM, which decides where to look, and a language LSTM, which predicts the next word.

    It differs from the paper in four points, as `SoftAttentionDecoder` does and for the same reasons:

    1. Regions are cells of a grid, layer-normalized over channels, instead of detected objects.
    2. Regions carry a position encoding.
    3. The coverage, times a weight that the attention LSTM predicts at every step, is added to the attention scores.
    4. Attention scores use ReLU instead of tanh.
    """

    def __init__(self, params: DecoderParams, grid_size: tuple[int, int], num_channels: int, vocab_size: int) -> None:
        """Build a decoder with random weights.

        Args:
            params: Sizes and dropout.
            grid_size: Height and width of the grid, in regions.
            num_channels: Channels of the grid, C.
            vocab_size: Vocabulary size, V.
        """
        super().__init__(params, grid_size, num_channels)
        attention_size, embedding_size, hidden_size = params.attention_size, params.embedding_size, params.hidden_size
        num_gates = 4 * hidden_size
        self._split_sizes = [attention_size, 1, num_gates]  # query, coverage weight, gates of the language LSTM
        self.key_proj = nn.Linear(self.region_size, attention_size)  # W_va
        self.score_weight = nn.Parameter(torch.empty(attention_size).uniform_(-1, 1) / attention_size**0.5)  # w_a
        self.embedding = nn.Embedding(vocab_size, embedding_size)  # W_e
        # Gates of the attention LSTM, from the previous word, the mean region, and the previous h1 and h2.
        self.word_proj = nn.Linear(embedding_size, num_gates, bias=False)
        self.mean_proj = nn.Linear(self.region_size, num_gates, bias=False)
        self.state_proj = nn.Linear(2 * hidden_size, num_gates)
        # Query, coverage weight and gates of the language LSTM, from h1; the gates also from context and previous h2.
        self.h1_proj = nn.Linear(hidden_size, sum(self._split_sizes))
        self.context_proj = nn.Linear(self.region_size, num_gates, bias=False)
        self.h2_proj = nn.Linear(hidden_size, num_gates, bias=False)
        self.output_proj = nn.Linear(hidden_size, vocab_size)  # W_p, eq. 7

    def prepare(self, grids: Tensor, num_steps: int = 0) -> EncodedImages:
        """Compute everything that depends on the images alone; `image_terms` are added to the gates [B, 1, 4H]."""
        regions = self._encode_regions(grids)  # [B, P, D]
        image_terms = self.mean_proj(regions.mean(dim=1, keepdim=True))
        return encode_images(image_terms, self.key_proj(regions), regions, (self.context_proj,), num_steps)

    def init_state(self, images: EncodedImages, num_captions: int) -> TopDownState:
        """Return the state before the first word: zeros."""
        zeros = self._zeros(images, num_captions, self.output_proj.in_features)  # [B, K, H]
        return TopDownState(zeros, zeros, zeros, zeros, self._zeros(images, num_captions, images.keys.shape[1]))

    def _step(
        self, tokens: Tensor, state: TopDownState, images: EncodedImages, word_projection: Tensor | None
    ) -> tuple[Tensor, TopDownState, Tensor]:
        """Read one word of each caption."""
        projected = self._project_tokens(self._embed(tokens), tokens, word_projection)  # [B, K, 4H]
        attention_gates = projected + images.image_terms + self._previous_states(state) @ self.state_proj.weight.T
        weights = self._language_weights(images)
        state, alpha, _ = self._recurrent_step(attention_gates, self.h1_proj.bias, state, images, weights)
        return self.dropout(state.h2), state, alpha

    def _steps(self, grids: Tensor, tokens: Tensor, word_projection: Tensor | None) -> tuple[Tensor, Tensor]:
        """Read whole captions.

        Everything that does not depend on the recurrent state is computed outside of the loop over steps.
        """
        num_captions, caption_length = tokens.shape[1:]
        images = self.prepare(grids, num_captions * caption_length)
        state = self.init_state(images, num_captions)
        tokens = tokens.permute(2, 0, 1)  # [T, B, K]
        projected = self._project_tokens(self._embed(tokens), tokens, word_projection)  # [T, B, K, 4H]
        addends = projected + images.image_terms  # [T, B, K, 4H]
        attention_loop = DeferredGradients(addends, self.state_proj.weight.T)
        bias = self.h1_proj.bias.to(addends.dtype).expand(*addends.shape[:3], -1)  # [T, B, K, A + 1 + 4H]
        language_loop = DeferredGradients(bias, *self._language_weights(images))
        h2s, alphas = [], []
        for attention_addend, language_addend in zip(attention_loop.steps(), language_loop.steps(), strict=True):
            previous_states, previous_h2 = self._previous_states(state), state.h2
            attention_gates = attention_addend + previous_states @ attention_loop.weights[0]
            state, alpha, attended = self._recurrent_step(
                attention_gates, language_addend, state, images, language_loop.weights
            )
            attention_loop.record(previous_states)
            language_loop.record(state.h1, attended, previous_h2)
            h2s.append(state.h2)
            alphas.append(alpha)
        return self.dropout(torch.stack(h2s, dim=2)), torch.stack(alphas, dim=2)

    def _project_words(self, embedded: Tensor) -> Tensor:
        """Project word embeddings [..., E] to the gates of the attention LSTM and add their bias: [..., 4H]."""
        return F.linear(embedded, self.word_proj.weight, self.state_proj.bias)

    def _previous_states(self, state: TopDownState) -> Tensor:
        """Return the part of the attention LSTM's input that depends on the previous step [B, K, 2H]."""
        return torch.cat([state.h1, state.h2], dim=-1)

    def _language_weights(self, images: EncodedImages) -> Sequence[Tensor]:
        """Return the matrices that project h1 to [A + 1 + 4H], and the context and the previous h2 to [4H]."""
        return [self.h1_proj.weight.T, *images.context_weights((self.context_proj,)), self.h2_proj.weight.T]

    def _recurrent_step(
        self,
        attention_gates: Tensor,
        bias: Tensor,
        state: TopDownState,
        images: EncodedImages,
        language_weights: Sequence[Tensor],
    ) -> tuple[TopDownState, Tensor, Tensor]:
        """Compute both LSTMs and the attention between them.

        Args:
            attention_gates: Gates of the attention LSTM [B, K, 4H] (eq. 2).
            bias: Bias of `h1_proj` [A + 1 + 4H], or of each caption [B, K, A + 1 + 4H].
            state: State before the step.
            images: Result of `prepare`.
            language_weights: Result of `_language_weights`.

        Returns:
            The next state, alpha [B, K, P], and the result of `images.attend`.
        """
        h1_weight, context_weight, h2_weight = language_weights
        h1, c1 = lstm_step(attention_gates, state.c1)  # [B, K, H] each, eq. 1
        query, coverage_weight, gates = torch.split(bias + h1 @ h1_weight, self._split_sizes, dim=-1)
        scores = self._attention_scores(images.keys, query, coverage_weight, state.coverage)  # [B, K, P], eq. 3
        alpha = scores.softmax(dim=-1)  # [B, K, P], eq. 4
        attended = images.attend(alpha)  # [B, K, D] or [B, K, P], eq. 5
        h2, c2 = lstm_step(gates + attended @ context_weight + state.h2 @ h2_weight, state.c2)  # eq. 6
        return TopDownState(h1, c1, h2, c2, state.coverage + alpha), alpha, attended
