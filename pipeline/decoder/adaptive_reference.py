"""The decoder of `adaptive.py` in slow and readable code.

Names and equation numbers are those of Lu et al. 2017 (arXiv:1612.01887). Shapes are those of `decoder_reference.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.decoder.adaptive import AdaptiveDecoder
from pipeline.decoder.decoder_reference import DecoderReference


class ReferenceState(NamedTuple):
    """Recurrent state between two decoding steps."""

    h: Tensor
    """Hidden state [N, H]."""
    c: Tensor
    """Cell state [N, H] (`m` in the paper)."""
    coverage: Tensor
    """Sum of the attention weights of all steps so far [N, P]."""


class AdaptiveReference(DecoderReference[ReferenceState]):
    """Adaptive attention with a visual sentinel, one layer per term."""

    def __init__(self, decoder: AdaptiveDecoder) -> None:
        """Copy the weights of a decoder, which must use neither word dropout nor region dropout."""
        super().__init__(decoder)
        region_size, hidden_size = decoder.region_proj.in_features, decoder.region_proj.out_features
        vocab_size, embedding_size = decoder.embedding.num_embeddings, decoder.embedding.embedding_dim
        attention_size = decoder.key_proj.out_features
        self.region_proj = nn.Linear(region_size, hidden_size)  # W_a
        self.mean_proj = nn.Linear(region_size, hidden_size)  # W_b
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.lstm = nn.LSTMCell(embedding_size + hidden_size, hidden_size)
        self.sentinel_gate = nn.Linear(embedding_size + 2 * hidden_size, hidden_size)  # W_x, W_h
        self.key_proj = nn.Linear(hidden_size, attention_size)  # W_v
        self.query_proj = nn.Linear(hidden_size, attention_size)  # W_g
        self.sentinel_proj = nn.Linear(hidden_size, attention_size, bias=False)  # W_s
        self.score_proj = nn.Linear(attention_size, 1, bias=False)  # w_h
        self.coverage_weight = nn.Linear(hidden_size, 1)
        self.output_proj = nn.Linear(hidden_size, vocab_size)  # W_p
        self._copy_weights(decoder)

    def init_state(self, regions: Tensor) -> ReferenceState:
        """Return the state before the first word: zeros."""
        zeros = regions.new_zeros(len(regions), self.output_proj.in_features)  # [N, H]
        return ReferenceState(zeros, zeros, regions.new_zeros(regions.shape[:2]))

    def decode_step(
        self, tokens: Tensor, state: ReferenceState, regions: Tensor
    ) -> tuple[Tensor, ReferenceState, Tensor]:
        """Read one word of each caption and predict the next."""
        features = self.region_proj(regions).relu()  # v_1 to v_P [N, P, H], eq. 15
        image_feature = self.mean_proj(regions.mean(dim=1)).relu()  # v_g [N, H], eqs. 14, 16
        embedded = self.dropout(self.embedding(tokens))  # [N, E]
        x = torch.cat([embedded, image_feature], dim=1)  # [N, E + H]
        h, c = self.lstm(x, (state.h, state.c))  # [N, H] each, eq. 4
        sentinel = self.sentinel_gate(torch.cat([x, state.h], dim=1)).sigmoid() * c.tanh()  # [N, H], eqs. 9, 10

        query = self.query_proj(h)  # [N, A]
        activations = F.relu(self.key_proj(features) + query.unsqueeze(1))  # [N, P, A]
        scores = self.score_proj(activations).squeeze(2)  # [N, P], eq. 6
        scores = scores + self.coverage_weight(h) * state.coverage  # [N, P]
        sentinel_score = self.score_proj(F.relu(self.sentinel_proj(sentinel) + query))  # [N, 1]
        beta = torch.cat([scores, sentinel_score], dim=1).softmax(dim=1)[:, -1:]  # [N, 1], eq. 12
        alpha = scores.softmax(dim=1)  # [N, P], eq. 7
        context = (alpha.unsqueeze(2) * features).sum(dim=1)  # [N, H], eq. 8
        context = beta * sentinel + (1 - beta) * context  # [N, H], eq. 11
        alpha = (1 - beta) * alpha  # as the decoder returns it

        logits = self.output_proj(self.dropout(context + h))  # [N, V], eq. 13
        return logits, ReferenceState(h, c, state.coverage + alpha), alpha

    @staticmethod
    def convert_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a decoder's weights, or their gradients, to the names and shapes of the reference.

        The decoder computes the gate of the sentinel and the LSTM gates by joint projections of the word, the image and
        the state, and the query and the coverage weight by one of h; the reference has a layer for each.
        """
        attention_size, hidden_size = len(weights["score_weight"]), weights["state_proj.weight"].shape[1]
        split_sizes = [hidden_size, 4 * hidden_size]
        word_sentinel, word_gates = torch.split(weights["word_proj.weight"], split_sizes)
        image_sentinel, image_gates = torch.split(weights["image_proj.weight"], split_sizes)
        state_sentinel, state_gates = torch.split(weights["state_proj.weight"], split_sizes)
        sentinel_bias, gates_bias = torch.split(weights["state_proj.bias"], split_sizes)
        query, coverage_weight = torch.split(weights["query_proj.weight"], [attention_size, 1])
        query_bias, coverage_bias = torch.split(weights["query_proj.bias"], [attention_size, 1])

        shared = ("non_local", "region_proj", "mean_proj", "embedding", "key_proj", "sentinel_proj", "output_proj")
        converted = {name: weight for name, weight in weights.items() if name.partition(".")[0] in shared}
        return converted | {
            "lstm.weight_ih": torch.cat([word_gates, image_gates], dim=1),
            "lstm.weight_hh": state_gates,
            "lstm.bias_ih": gates_bias,
            "lstm.bias_hh": torch.zeros_like(gates_bias),
            "sentinel_gate.weight": torch.cat([word_sentinel, image_sentinel, state_sentinel], dim=1),
            "sentinel_gate.bias": sentinel_bias,
            "query_proj.weight": query,
            "query_proj.bias": query_bias,
            "score_proj.weight": weights["score_weight"].unsqueeze(0),
            "coverage_weight.weight": coverage_weight,
            "coverage_weight.bias": coverage_bias,
        }
