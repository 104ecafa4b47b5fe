"""The decoder with adaptive attention and a visual sentinel (Lu et al. 2017, arXiv:1612.01887).

Names and equation numbers are those of the paper. `adaptive_reference.py` is the same model in slow and readable code.

Shapes are those of `decoder.py`, and
    G  size of the joint projection to the gate of the sentinel and the LSTM gates: 5H
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.decoder.decoder import Decoder, DecoderParams
from pipeline.decoder.deferred_gradients import DeferredGradients
from pipeline.decoder.encoded_images import EncodedImages, RegionFeatures
from pipeline.decoder.layers import lstm_step


class AdaptiveState(NamedTuple):
    """Recurrent state between two decoding steps."""

    h: Tensor
    """Hidden state [B, K, H]."""
    c: Tensor
    """Cell state [B, K, H] (`m` in the paper)."""
    coverage: Tensor
    """Sum of the attention weights of all steps so far [B, K, P]."""


class AdaptiveDecoder(Decoder[AdaptiveState]):
    """LSTM decoder that attends after reading the word, to the regions or to a visual sentinel.

    The sentinel is what the LSTM knows without looking at the image. Its weight beta is 1 minus the sum of alpha.

    It differs from the paper in four points, as `SoftAttentionDecoder` does and for the same reasons:

    1. Regions are layer-normalized over channels.
    2. Regions carry a position encoding.
    3. The coverage, times a weight that is predicted at every step, is added to the attention scores of the regions.
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
        self._split_sizes = [hidden_size, 4 * hidden_size]  # gate of the sentinel, LSTM gates
        self.region_proj = nn.Linear(self.region_size, hidden_size)  # W_a
        self.mean_proj = nn.Linear(self.region_size, hidden_size)  # W_b
        self.key_proj = nn.Linear(hidden_size, attention_size)  # W_v
        self.score_weight = nn.Parameter(torch.empty(attention_size).uniform_(-1, 1) / attention_size**0.5)  # w_h
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.word_proj = nn.Linear(embedding_size, sum(self._split_sizes), bias=False)
        self.image_proj = nn.Linear(hidden_size, sum(self._split_sizes), bias=False)
        self.state_proj = nn.Linear(hidden_size, sum(self._split_sizes))
        self.query_proj = nn.Linear(hidden_size, attention_size + 1)  # W_g, and the coverage weight
        self.sentinel_proj = nn.Linear(hidden_size, attention_size, bias=False)  # W_s
        self.output_proj = nn.Linear(hidden_size, vocab_size)  # W_p

    def prepare(self, grids: Tensor, num_steps: int = 0) -> RegionFeatures:
        """Compute everything that depends on the images alone.

        `regions` are V [B, P, H], `image_terms` the projection of the global image feature [B, 1, G].
        """
        encoded = self._encode_regions(grids)  # [B, P, D]
        regions = self.region_proj(encoded).relu()  # [B, P, H], eq. 15
        image_feature = self.mean_proj(encoded.mean(dim=1, keepdim=True)).relu()  # [B, 1, H], eqs. 14, 16
        return RegionFeatures(self.image_proj(image_feature), self.key_proj(regions), regions)

    def init_state(self, images: EncodedImages, num_captions: int) -> AdaptiveState:
        """Return the state before the first word: zeros."""
        zeros = self._zeros(images, num_captions, self.output_proj.in_features)  # [B, K, H]
        return AdaptiveState(zeros, zeros, self._zeros(images, num_captions, images.keys.shape[1]))

    def _step(
        self, tokens: Tensor, state: AdaptiveState, images: EncodedImages, word_projection: Tensor | None
    ) -> tuple[Tensor, AdaptiveState, Tensor]:
        """Read one word of each caption."""
        projected = self._project_tokens(self._embed(tokens), tokens, word_projection) + images.image_terms
        h, c, sentinel = self._recurrent_step(projected + state.h @ self.state_proj.weight.T, state.c)
        query, coverage_weight, sentinel_score = self._project_states(h, sentinel)
        alpha, beta = self._attend(images, query, coverage_weight, sentinel_score, state.coverage)
        return self._outputs(images, alpha, beta, sentinel, h), AdaptiveState(h, c, state.coverage + alpha), alpha

    def _steps(self, grids: Tensor, tokens: Tensor, word_projection: Tensor | None) -> tuple[Tensor, Tensor]:
        """Read whole captions.

        The LSTM does not depend on the attention, and the attention on the earlier attention by its coverage alone.
        """
        images, num_captions = self.prepare(grids), tokens.shape[1]
        state = self.init_state(images, num_captions)
        tokens = tokens.permute(2, 0, 1)  # [T, B, K]
        projected = self._project_tokens(self._embed(tokens), tokens, word_projection)  # [T, B, K, G]
        addends = projected + images.image_terms  # [T, B, K, G]
        loop = DeferredGradients(addends, self.state_proj.weight.T)
        h, c = state.h, state.c
        h_steps, sentinel_steps = [], []
        for addend in loop.steps():
            previous_h = h
            h, c, sentinel = self._recurrent_step(addend + h @ loop.weights[0], c)
            loop.record(previous_h)
            h_steps.append(h)
            sentinel_steps.append(sentinel)
        hs, sentinels = torch.stack(h_steps), torch.stack(sentinel_steps)  # [T, B, K, H]

        coverage = state.coverage
        alphas, betas = [], []
        for projections in zip(*self._project_states(hs, sentinels), strict=True):
            alpha, beta = self._attend(images, *projections, coverage)
            coverage = coverage + alpha
            alphas.append(alpha)
            betas.append(beta)
        alpha, beta = torch.stack(alphas, dim=2), torch.stack(betas, dim=2)  # [B, K, T, P], [B, K, T, 1]
        hs, sentinels = hs.permute(1, 2, 0, 3), sentinels.permute(1, 2, 0, 3)  # [B, K, T, H]
        return self._outputs(images, alpha, beta, sentinels, hs), alpha

    def _project_words(self, embedded: Tensor) -> Tensor:
        """Project word embeddings [..., E] and add the bias of the joint projection: [..., G]."""
        return F.linear(embedded, self.word_proj.weight, self.state_proj.bias)

    def _recurrent_step(self, projected: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the LSTM and the visual sentinel.

        Args:
            projected: Gate of the sentinel and LSTM gates [B, K, G].
            c: Cell state before the step [B, K, H].

        Returns:
            The next h, the next c, and the sentinel, each [B, K, H].
        """
        sentinel_gate, gates = torch.split(projected, self._split_sizes, dim=-1)
        h, c = lstm_step(gates, c)
        return h, c, sentinel_gate.sigmoid() * c.tanh()  # eqs. 9, 10

    def _project_states(self, h: Tensor, sentinel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what attention needs of h and the sentinel [..., H].

        Returns:
            Query [..., A], coverage weight [..., 1], and attention score of the sentinel [..., 1].
        """
        query, coverage_weight = torch.split(self.query_proj(h), [len(self.score_weight), 1], dim=-1)
        sentinel_score = (self.sentinel_proj(sentinel) + query).relu() @ self.score_weight.unsqueeze(-1)
        return query, coverage_weight, sentinel_score

    def _attend(
        self, images: EncodedImages, query: Tensor, coverage_weight: Tensor, sentinel_score: Tensor, coverage: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the attention of one step.

        Args:
            images: Result of `prepare`.
            query: Queries [B, K, A].
            coverage_weight: Weight of the coverage [B, K, 1].
            sentinel_score: Attention score of the sentinel [B, K, 1].
            coverage: Sum of the attention weights of all steps so far [B, K, P].

        Returns:
            Attention weights of the regions, alpha [B, K, P], and of the sentinel, beta [B, K, 1]; together they sum to
            1. In the paper, alpha is normalized without the sentinel, and later multiplied by 1 - beta.
        """
        scores = self._attention_scores(images.keys, query, coverage_weight, coverage)  # [B, K, P], eq. 6
        weights = torch.cat([scores, sentinel_score.to(scores.dtype)], dim=-1).softmax(dim=-1)  # [B, K, P + 1], eq. 12
        alpha, beta = torch.split(weights, [scores.shape[-1], 1], dim=-1)
        return alpha, beta

    def _outputs(self, images: EncodedImages, alpha: Tensor, beta: Tensor, sentinel: Tensor, h: Tensor) -> Tensor:
        """Compute inputs of the output layer [B, K, ..., H] from alpha, beta, sentinel and h (eqs. 8, 11, 13)."""
        context = images.attend(alpha.flatten(1, -2)).view_as(h)  # [B, K, ..., H]
        outputs: Tensor = self.dropout(context + beta * sentinel + h)
        return outputs
