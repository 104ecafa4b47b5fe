"""The decoder of Show, Attend and Tell (Xu et al. 2015, arXiv:1502.03044) with deterministic soft attention.

Names and equation numbers are those of the paper. `soft_attention_reference.py` is the same model in slow and readable
code.

Shapes are those of `decoder.py` (`P` regions are `L` in the paper), and
    G  size of the joint projection to query, beta, coverage weight and LSTM gates: A + 2 + 4H
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.decoder.decoder import Decoder, DecoderParams
from pipeline.decoder.deferred_gradients import DeferredGradients
from pipeline.decoder.encoded_images import EncodedImages, encode_images
from pipeline.decoder.layers import lstm_step


class SoftAttentionState(NamedTuple):
    """Recurrent state between two decoding steps."""

    h: Tensor
    """Hidden state [B, K, H]."""
    c: Tensor
    """Cell state [B, K, H]."""
    coverage: Tensor
    """Sum of the attention weights of all steps so far [B, K, P]."""


class SoftAttentionDecoder(Decoder[SoftAttentionState]):
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
        self._split_sizes = [attention_size, 1, 1, 4 * hidden_size]  # query, beta, coverage weight, LSTM gates
        self.key_proj = nn.Linear(self.region_size, attention_size)
        self.score_weight = nn.Parameter(torch.empty(attention_size).uniform_(-1, 1) / attention_size**0.5)
        self.init_h = nn.Linear(self.region_size, hidden_size)
        self.init_c = nn.Linear(self.region_size, hidden_size)
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.word_proj = nn.Linear(embedding_size, sum(self._split_sizes), bias=False)
        self.context_proj = nn.Linear(self.region_size, 4 * hidden_size, bias=False)
        self.state_proj = nn.Linear(hidden_size, sum(self._split_sizes))
        self.state_output = nn.Linear(hidden_size, embedding_size)  # L_h
        self.context_output = nn.Linear(self.region_size, embedding_size, bias=False)  # L_z
        self.output_proj = nn.Linear(embedding_size, vocab_size)  # L_o
        self._context_layers = (self.context_proj, self.context_output)

    def prepare(self, grids: Tensor, num_steps: int = 0) -> EncodedImages:
        """Compute everything that depends on the images alone; `image_terms` are the first h and c [B, 1, 2H]."""
        regions = self._encode_regions(grids)  # [B, P, D]
        mean = regions.mean(dim=1, keepdim=True)  # [B, 1, D]
        image_terms = torch.cat([torch.tanh(self.init_h(mean)), torch.tanh(self.init_c(mean))], dim=-1)
        return encode_images(image_terms, self.key_proj(regions), regions, self._context_layers, num_steps)

    def init_state(self, images: EncodedImages, num_captions: int) -> SoftAttentionState:
        """Return the state before the first word, which `prepare` computed from the mean region."""
        h, c = images.image_terms.chunk(2, dim=-1)  # [B, 1, H] each
        coverage = self._zeros(images, num_captions, images.keys.shape[1])  # [B, K, P]
        # Contiguous, as a product with an expanded tensor would copy the weights for each image.
        h = h.expand(-1, num_captions, -1).contiguous()  # [B, K, H]
        # Under autocast, c keeps the precision of the weights, since it accumulates over steps.
        return SoftAttentionState(h, c.expand(-1, num_captions, -1).to(coverage.dtype), coverage)

    def _step(
        self,
        tokens: Tensor,
        state: SoftAttentionState,
        images: EncodedImages,
        word_projection: Tensor | None,
    ) -> tuple[Tensor, SoftAttentionState, Tensor]:
        """Read one word of each caption."""
        embedded = self._embed(tokens)  # [B, K, E]
        projected = self._project_tokens(embedded, tokens, word_projection)  # [B, K, G]
        gate_weight, output_weight = images.context_weights(self._context_layers)
        state, alpha, attended = self._recurrent_step(projected, state, images, self.state_proj.weight.T, gate_weight)
        return self._outputs(embedded, state.h, attended @ output_weight), state, alpha

    def _steps(self, grids: Tensor, tokens: Tensor, word_projection: Tensor | None) -> tuple[Tensor, Tensor]:
        """Read whole captions.

        Everything that does not depend on the recurrent state is computed outside of the loop over steps.
        """
        num_captions, caption_length = tokens.shape[1:]
        images = self.prepare(grids, num_captions * caption_length)
        state = self.init_state(images, num_captions)
        tokens = tokens.permute(2, 0, 1)  # [T, B, K]
        embedded = self._embed(tokens)  # [T, B, K, E]
        addends = self._project_tokens(embedded, tokens, word_projection)  # [T, B, K, G]
        gate_weight, output_weight = images.context_weights(self._context_layers)
        loop = DeferredGradients(addends, self.state_proj.weight.T, gate_weight)
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
        outputs = self._outputs(embedded, torch.stack(hs, dim=2), context_term.view_as(embedded))  # [B, K, T, E]
        return outputs, torch.stack(alphas, dim=2)

    def _project_words(self, embedded: Tensor) -> Tensor:
        """Project word embeddings [..., E] and add the bias of the joint projection: [..., G]."""
        return F.linear(embedded, self.word_proj.weight, self.state_proj.bias)

    def _recurrent_step(
        self,
        word_projection: Tensor,
        state: SoftAttentionState,
        images: EncodedImages,
        state_weight: Tensor,
        gate_weight: Tensor,
    ) -> tuple[SoftAttentionState, Tensor, Tensor]:
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
        scores = self._attention_scores(images.keys, query, coverage_weight, state.coverage)  # [B, K, P], eq. 4
        alpha = scores.softmax(dim=-1)  # [B, K, P], eq. 5
        gated_alpha = beta_logit.sigmoid() * alpha  # [B, K, P]
        attended = images.attend(gated_alpha)  # [B, K, D] or [B, K, P], eq. 13
        h, c = lstm_step(gates + attended @ gate_weight, state.c)  # [B, K, H] each, eqs. 1-3
        return SoftAttentionState(h, c, state.coverage + alpha), alpha, attended

    def _outputs(self, embedded: Tensor, h: Tensor, context_term: Tensor) -> Tensor:
        """Compute inputs of the output layer [..., E] from word embeddings, h and L_z times context (eq. 7)."""
        outputs: Tensor = self.dropout(torch.tanh(embedded + self.state_output(h) + context_term))
        return outputs
