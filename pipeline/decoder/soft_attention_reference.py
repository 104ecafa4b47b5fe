"""The decoder as a tutorial would write it: what ours has to equal, and what it has to be faster than.

Shapes: `B` images, `K` captions an image, `T` words, `P` regions, `C` channels, `V` words known, `A` attention,
`E` embedding, `H` state, `R` rows: a caption each, `B * K`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.decoder.soft_attention import SoftAttentionDecoder


class ReferenceState(NamedTuple):
    """What the decoder remembers between words, a row a caption."""

    hidden: Tensor
    """[R, H]"""
    cell: Tensor
    """[R, H]"""
    coverage: Tensor
    """[R, P], the attention of all words so far, summed."""


class SoftAttentionReference(nn.Module):
    """A decoder's mathematics one word at a time, with its weights at the time of making.

    Every caption is a row with a copy of its image's regions. For every word the keys are computed anew, each row
    holds its comparison with each region [R, P, A], an LSTM cell takes one step on word and context, and the state is
    multiplied with the vocabulary.
    """

    position_encoding: Tensor

    def __init__(self, decoder: SoftAttentionDecoder) -> None:
        super().__init__()
        assert decoder.word_dropout.p == decoder.region_dropout.p == 0, "tutorials have neither"
        channels, size = decoder.key.in_features, decoder.key.out_features
        words, embedding = decoder.embedding.num_embeddings, decoder.embedding.embedding_dim
        state = decoder.init_h.out_features
        self.register_buffer("position_encoding", decoder.position_encoding, persistent=False)
        self.key = nn.Linear(channels, size)
        self.query = nn.Linear(embedding + state, size)
        self.seek = nn.Linear(embedding + state, 1)
        self.gate = nn.Linear(embedding + state, 1)
        self.energy = nn.Linear(size, 1, bias=False)
        self.init_h = nn.Linear(channels, state)
        self.init_c = nn.Linear(channels, state)
        self.embedding = nn.Embedding(words, embedding)
        self.cell = nn.LSTMCell(embedding + channels, state)
        self.state_output = nn.Linear(state, embedding)
        self.context_output = nn.Linear(channels, embedding, bias=False)
        self.output_proj = nn.Linear(embedding, words)
        self.dropout = nn.Dropout(decoder.dropout.p)
        self.to(decoder.energy)
        self.load_state_dict(reference_names({name: weights.detach() for name, weights in decoder.named_parameters()}))
        # An LSTM cell adds two biases, where one would do: this one stays 0.
        self.cell.bias_hh.requires_grad_(False)

    def forward(self, grids: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Take grids [B, P, C] and ids [B, K, T]; returns logits [B, K, T, V] and attention [B, K, T, P]."""
        regions = self.prepare(grids).repeat_interleave(words.shape[1], dim=0)  # [R, P, C + 16]
        state = self.init_state(regions)
        logits, attentions = [], []
        for ids in words.flatten(0, 1).unbind(dim=1):
            predicted, state, attention = self.decode_step(ids, state, regions)
            logits.append(predicted)
            attentions.append(attention)
        stacked = torch.stack(logits, dim=1), torch.stack(attentions, dim=1)
        predicted, attention = (values.view(*words.shape[:2], *values.shape[1:]) for values in stacked)
        return predicted, attention

    def prepare(self, grids: Tensor) -> Tensor:
        """Regions [B, P, C + 16] of grids [B, P, C]."""
        normalized = F.layer_norm(grids.to(self.position_encoding.dtype), grids.shape[2:])
        return torch.cat([normalized, self.position_encoding.expand(len(grids), -1, -1)], dim=-1)

    def init_state(self, regions: Tensor) -> ReferenceState:
        """The state of each row before its first word."""
        mean = regions.mean(dim=1)
        return ReferenceState(self.init_h(mean).tanh(), self.init_c(mean).tanh(), regions.new_zeros(regions.shape[:2]))

    def decode_step(self, ids: Tensor, state: ReferenceState, regions: Tensor) -> tuple[Tensor, ReferenceState, Tensor]:
        """Read a word a row, ids [R]; returns logits [R, V], the next state and attention [R, P]."""
        word = self.dropout(self.embedding(ids))
        asking = torch.cat([word, state.hidden], dim=1)
        compared = F.relu(self.key(regions) + self.query(asking).unsqueeze(1))  # [R, P, A]
        additive_scores = self.energy(compared).squeeze(2) + self.seek(asking) * state.coverage
        attention = additive_scores.softmax(dim=1)
        context = self.gate(asking).sigmoid() * (regions * attention.unsqueeze(2)).sum(dim=1)
        hidden, cell = self.cell(torch.cat([word, context], dim=1), (state.hidden, state.cell))
        deep = torch.tanh(word + self.state_output(hidden) + self.context_output(context))
        return self.output_proj(self.dropout(deep)), ReferenceState(hidden, cell, state.coverage + attention), attention


def reference_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A decoder's weights, or their gradients, as the textbook has them."""
    size, state = len(tensors["energy"]), len(tensors["init_h.bias"])
    parts = [size, 1, 1, 4 * state]
    names = ("query", "gate", "seek")
    *word_proj, word_gates = torch.split(tensors["word_proj.weight"], parts)
    *state_proj, state_gates = torch.split(tensors["state_proj.weight"], parts)
    *biases, gates_bias = torch.split(tensors["state_proj.bias"], parts)
    same = ("key", "init_h", "init_c", "embedding", "state_output", "context_output", "output_proj")
    return {
        **{name: tensor for name, tensor in tensors.items() if name.split(".")[0] in same},
        **{f"{n}.weight": torch.cat(pair, dim=1) for n, *pair in zip(names, word_proj, state_proj, strict=True)},
        **{f"{name}.bias": bias for name, bias in zip(names, biases, strict=True)},
        "energy.weight": tensors["energy"].unsqueeze(0),
        "cell.weight_ih": torch.cat([word_gates, tensors["context_gates.weight"]], dim=1),
        "cell.weight_hh": state_gates,
        "cell.bias_ih": gates_bias,
        "cell.bias_hh": torch.zeros_like(gates_bias),
    }
