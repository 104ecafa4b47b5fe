"""The decoder of `top_down.py` in slow and readable code.

Names and equation numbers are those of Anderson et al. 2018 (arXiv:1707.07998). Shapes are those of
`decoder_reference.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.decoder.decoder_reference import DecoderReference
from pipeline.decoder.top_down import TopDownDecoder


class ReferenceState(NamedTuple):
    """Recurrent state between two decoding steps."""

    h1: Tensor
    """Hidden state of the attention LSTM [N, H]."""
    c1: Tensor
    """Cell state of the attention LSTM [N, H]."""
    h2: Tensor
    """Hidden state of the language LSTM [N, H]."""
    c2: Tensor
    """Cell state of the language LSTM [N, H]."""
    coverage: Tensor
    """Sum of the attention weights of all steps so far [N, P]."""


class TopDownReference(DecoderReference[ReferenceState]):
    """The two-LSTM decoder, one layer per term."""

    def __init__(self, decoder: TopDownDecoder) -> None:
        """Copy the weights of a decoder, which must use neither word dropout nor region dropout."""
        super().__init__(decoder)
        region_size, attention_size = decoder.key_proj.in_features, decoder.key_proj.out_features
        vocab_size, embedding_size = decoder.embedding.num_embeddings, decoder.embedding.embedding_dim
        hidden_size = decoder.output_proj.in_features
        self.embedding = nn.Embedding(vocab_size, embedding_size)  # W_e
        self.attention_lstm = nn.LSTMCell(hidden_size + region_size + embedding_size, hidden_size)
        self.key_proj = nn.Linear(region_size, attention_size)  # W_va
        self.query_proj = nn.Linear(hidden_size, attention_size)  # W_ha
        self.score_proj = nn.Linear(attention_size, 1, bias=False)  # w_a
        self.coverage_weight = nn.Linear(hidden_size, 1)
        self.language_lstm = nn.LSTMCell(region_size + hidden_size, hidden_size)
        self.output_proj = nn.Linear(hidden_size, vocab_size)  # W_p
        self._copy_weights(decoder)

    def init_state(self, regions: Tensor) -> ReferenceState:
        """Return the state before the first word: zeros."""
        zeros = regions.new_zeros(len(regions), self.output_proj.in_features)  # [N, H]
        return ReferenceState(zeros, zeros, zeros, zeros, regions.new_zeros(regions.shape[:2]))

    def decode_step(
        self, tokens: Tensor, state: ReferenceState, regions: Tensor
    ) -> tuple[Tensor, ReferenceState, Tensor]:
        """Read one word of each caption and predict the next."""
        embedded = self.dropout(self.embedding(tokens))  # [N, E]
        attention_input = torch.cat([state.h2, regions.mean(dim=1), embedded], dim=1)  # [N, H + D + E], eq. 2
        h1, c1 = self.attention_lstm(attention_input, (state.h1, state.c1))  # [N, H] each, eq. 1

        activations = F.relu(self.key_proj(regions) + self.query_proj(h1).unsqueeze(1))  # [N, P, A]
        scores = self.score_proj(activations).squeeze(2)  # [N, P], eq. 3
        scores = scores + self.coverage_weight(h1) * state.coverage  # [N, P]
        alpha = scores.softmax(dim=1)  # [N, P], eq. 4
        context = (alpha.unsqueeze(2) * regions).sum(dim=1)  # [N, D], eq. 5

        language_input = torch.cat([context, h1], dim=1)  # [N, D + H], eq. 6
        h2, c2 = self.language_lstm(language_input, (state.h2, state.c2))  # [N, H] each, eq. 1

        logits = self.output_proj(self.dropout(h2))  # [N, V], eq. 7
        return logits, ReferenceState(h1, c1, h2, c2, state.coverage + alpha), alpha

    @staticmethod
    def convert_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a decoder's weights, or their gradients, to the names and shapes of the reference.

        The decoder splits the matrices of both LSTMs by their inputs, and joins query, coverage weight and gates.
        """
        attention_size, hidden_size = len(weights["score_weight"]), weights["h2_proj.weight"].shape[1]
        split_sizes = [attention_size, 1, 4 * hidden_size]
        query, coverage_weight, language_h1 = torch.split(weights["h1_proj.weight"], split_sizes)
        query_bias, coverage_bias, language_bias = torch.split(weights["h1_proj.bias"], split_sizes)
        attention_h1, attention_h2 = weights["state_proj.weight"].chunk(2, dim=1)

        shared = ("non_local", "embedding", "key_proj", "output_proj")
        converted = {name: weight for name, weight in weights.items() if name.partition(".")[0] in shared}
        return converted | {
            "attention_lstm.weight_ih": torch.cat(
                [attention_h2, weights["mean_proj.weight"], weights["word_proj.weight"]], dim=1
            ),
            "attention_lstm.weight_hh": attention_h1,
            "attention_lstm.bias_ih": weights["state_proj.bias"],
            "attention_lstm.bias_hh": torch.zeros_like(language_bias),
            "query_proj.weight": query,
            "query_proj.bias": query_bias,
            "score_proj.weight": weights["score_weight"].unsqueeze(0),
            "coverage_weight.weight": coverage_weight,
            "coverage_weight.bias": coverage_bias,
            "language_lstm.weight_ih": torch.cat([weights["context_proj.weight"], language_h1], dim=1),
            "language_lstm.weight_hh": weights["h2_proj.weight"],
            "language_lstm.bias_ih": language_bias,
            "language_lstm.bias_hh": torch.zeros_like(language_bias),
        }
