"""The decoder of `soft_attention.py` in slow and readable code.

Names and equation numbers are those of Show, Attend and Tell (Xu et al. 2015, arXiv:1502.03044). Shapes are those of
`decoder_reference.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.decoder.decoder_reference import DecoderReference
from pipeline.decoder.soft_attention import SoftAttentionDecoder


class ReferenceState(NamedTuple):
    """Recurrent state between two decoding steps."""

    h: Tensor
    """Hidden state [N, H]."""
    c: Tensor
    """Cell state [N, H]."""
    coverage: Tensor
    """Sum of the attention weights of all steps so far [N, P]."""


class SoftAttentionReference(DecoderReference[ReferenceState]):
    """Show, Attend and Tell, one layer per term."""

    def __init__(self, decoder: SoftAttentionDecoder) -> None:
        """Copy the weights of a decoder, which must use neither word dropout nor region dropout."""
        super().__init__(decoder)
        region_size, attention_size = decoder.key_proj.in_features, decoder.key_proj.out_features
        vocab_size, embedding_size = decoder.embedding.num_embeddings, decoder.embedding.embedding_dim
        hidden_size = decoder.init_h.out_features
        self.key_proj = nn.Linear(region_size, attention_size)
        self.query_proj = nn.Linear(embedding_size + hidden_size, attention_size)
        self.score_proj = nn.Linear(attention_size, 1, bias=False)
        self.coverage_weight = nn.Linear(embedding_size + hidden_size, 1)
        self.f_beta = nn.Linear(embedding_size + hidden_size, 1)
        self.init_h = nn.Linear(region_size, hidden_size)
        self.init_c = nn.Linear(region_size, hidden_size)
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        self.lstm = nn.LSTMCell(embedding_size + region_size, hidden_size)
        self.state_output = nn.Linear(hidden_size, embedding_size)  # L_h
        self.context_output = nn.Linear(region_size, embedding_size, bias=False)  # L_z
        self.output_proj = nn.Linear(embedding_size, vocab_size)  # L_o
        self._copy_weights(decoder)

    def init_state(self, regions: Tensor) -> ReferenceState:
        """Compute the state before the first word from the mean of the regions [N, P, D]."""
        mean = regions.mean(dim=1)  # [N, D]
        h = self.init_h(mean).tanh()  # [N, H]
        c = self.init_c(mean).tanh()  # [N, H]
        coverage = regions.new_zeros(regions.shape[:2])  # [N, P]
        return ReferenceState(h, c, coverage)

    def decode_step(
        self, tokens: Tensor, state: ReferenceState, regions: Tensor
    ) -> tuple[Tensor, ReferenceState, Tensor]:
        """Read one word of each caption and predict the next."""
        embedded = self.dropout(self.embedding(tokens))  # [N, E]
        word_and_state = torch.cat([embedded, state.h], dim=1)  # [N, E + H]

        activations = F.relu(self.key_proj(regions) + self.query_proj(word_and_state).unsqueeze(1))  # [N, P, A]
        scores = self.score_proj(activations).squeeze(2)  # [N, P], eq. 4
        scores = scores + self.coverage_weight(word_and_state) * state.coverage  # [N, P]
        alpha = scores.softmax(dim=1)  # [N, P], eq. 5

        beta = self.f_beta(word_and_state).sigmoid()  # [N, 1]
        context = beta * (alpha.unsqueeze(2) * regions).sum(dim=1)  # [N, D], eq. 13 with beta

        h, c = self.lstm(torch.cat([embedded, context], dim=1), (state.h, state.c))  # [N, H] each, eqs. 1-3

        deep_output = torch.tanh(embedded + self.state_output(h) + self.context_output(context))  # [N, E]
        logits = self.output_proj(self.dropout(deep_output))  # [N, V], eq. 7
        return logits, ReferenceState(h, c, state.coverage + alpha), alpha

    @staticmethod
    def convert_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a decoder's weights, or their gradients, to the names and shapes of the reference.

        The decoder computes query, beta, coverage weight and LSTM gates by joint projections of the word and of the
        state; the reference has a layer for each.
        """
        attention_size, hidden_size = len(weights["score_weight"]), len(weights["init_h.bias"])
        split_sizes = [attention_size, 1, 1, 4 * hidden_size]
        *word_weights, word_gates = torch.split(weights["word_proj.weight"], split_sizes)
        *state_weights, state_gates = torch.split(weights["state_proj.weight"], split_sizes)
        *biases, gates_bias = torch.split(weights["state_proj.bias"], split_sizes)

        shared = (
            "non_local",
            "key_proj",
            "init_h",
            "init_c",
            "embedding",
            "state_output",
            "context_output",
            "output_proj",
        )
        converted = {name: weight for name, weight in weights.items() if name.partition(".")[0] in shared}
        names = ("query_proj", "f_beta", "coverage_weight")
        for name, word_weight, state_weight, bias in zip(names, word_weights, state_weights, biases, strict=True):
            converted[f"{name}.weight"] = torch.cat([word_weight, state_weight], dim=1)
            converted[f"{name}.bias"] = bias
        converted["score_proj.weight"] = weights["score_weight"].unsqueeze(0)
        converted["lstm.weight_ih"] = torch.cat([word_gates, weights["context_proj.weight"]], dim=1)
        converted["lstm.weight_hh"] = state_gates
        converted["lstm.bias_ih"] = gates_bias
        converted["lstm.bias_hh"] = torch.zeros_like(gates_bias)
        return converted
