"""The decoder as a tutorial would write it: what ours has to equal, and what it has to be faster than.

Shapes: `B` images, `K` captions an image, `T` words, `P` regions, `C` channels, `V` words known, `A` attention,
`E` embedding, `H` state, `R` rows: a caption each, `B * K`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.decoder.attention import AttentionDecoder


class State(NamedTuple):
    """What the decoder remembers between words, a row a caption."""

    hidden: Tensor
    """[R, H]"""
    cell: Tensor
    """[R, H]"""
    seen: Tensor
    """[R, P], the attention of all words so far, summed."""


class Textbook(nn.Module):
    """A decoder's mathematics one word at a time, with its weights at the time of making.

    Every caption is a row with a copy of its image's regions. For every word the keys are computed anew, each row
    holds its comparison with each region [R, P, A], an LSTM cell takes one step on word and context, and the state is
    multiplied with the vocabulary.
    """

    places: Tensor

    def __init__(self, decoder: AttentionDecoder) -> None:
        super().__init__()
        assert decoder.word_dropout.p == decoder.region_dropout.p == 0, "tutorials have neither"
        channels, size = decoder.key.in_features, decoder.key.out_features
        words, embedding = decoder.embedding.num_embeddings, decoder.embedding.embedding_dim
        state = decoder.first_hidden.out_features
        self.register_buffer("places", decoder.places, persistent=False)
        self.key = nn.Linear(channels, size)
        self.query = nn.Linear(embedding + state, size)
        self.seek = nn.Linear(embedding + state, 1)
        self.gate = nn.Linear(embedding + state, 1)
        self.energy = nn.Linear(size, 1, bias=False)
        self.first_hidden = nn.Linear(channels, state)
        self.first_cell = nn.Linear(channels, state)
        self.embedding = nn.Embedding(words, embedding)
        self.cell = nn.LSTMCell(embedding + channels, state)
        self.state_output = nn.Linear(state, embedding)
        self.context_output = nn.Linear(channels, embedding, bias=False)
        self.vocabulary = nn.Linear(embedding, words)
        self.dropout = nn.Dropout(decoder.dropout.p)
        self.to(decoder.energy)
        self.load_state_dict(renamed({name: weights.detach() for name, weights in decoder.named_parameters()}))
        # An LSTM cell adds two biases, where one would do: this one stays 0.
        self.cell.bias_hh.requires_grad_(False)

    def forward(self, grids: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Take grids [B, P, C] and ids [B, K, T]; returns logits [B, K, T, V] and attention [B, K, T, P]."""
        regions = self.look(grids).repeat_interleave(words.shape[1], dim=0)  # [R, P, C + 16]
        state = self.start(regions)
        logits, attentions = [], []
        for ids in words.flatten(0, 1).unbind(dim=1):
            predicted, state, attention = self.step(ids, state, regions)
            logits.append(predicted)
            attentions.append(attention)
        stacked = torch.stack(logits, dim=1), torch.stack(attentions, dim=1)
        predicted, attention = (values.view(*words.shape[:2], *values.shape[1:]) for values in stacked)
        return predicted, attention

    def look(self, grids: Tensor) -> Tensor:
        """Regions [B, P, C + 16] of grids [B, P, C]."""
        normalised = F.layer_norm(grids.to(self.places.dtype), grids.shape[2:])
        return torch.cat([normalised, self.places.expand(len(grids), -1, -1)], dim=-1)

    def start(self, regions: Tensor) -> State:
        """The state of each row before its first word."""
        mean = regions.mean(dim=1)
        return State(self.first_hidden(mean).tanh(), self.first_cell(mean).tanh(), regions.new_zeros(regions.shape[:2]))

    def step(self, ids: Tensor, state: State, regions: Tensor) -> tuple[Tensor, State, Tensor]:
        """Read a word a row, ids [R]; returns logits [R, V], the next state and attention [R, P]."""
        word = self.dropout(self.embedding(ids))
        asking = torch.cat([word, state.hidden], dim=1)
        compared = F.relu(self.key(regions) + self.query(asking).unsqueeze(1))  # [R, P, A]
        energies = self.energy(compared).squeeze(2) + self.seek(asking) * state.seen
        attention = energies.softmax(dim=1)
        context = self.gate(asking).sigmoid() * (regions * attention.unsqueeze(2)).sum(dim=1)
        hidden, cell = self.cell(torch.cat([word, context], dim=1), (state.hidden, state.cell))
        deep = torch.tanh(word + self.state_output(hidden) + self.context_output(context))
        return self.vocabulary(self.dropout(deep)), State(hidden, cell, state.seen + attention), attention


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A decoder's weights, or their gradients, as the textbook has them."""
    size, state = len(tensors["energy"]), len(tensors["first_hidden.bias"])
    parts = [size, 1, 1, 4 * state]
    names = ("query", "gate", "seek")
    *from_word, word_gates = torch.split(tensors["from_word.weight"], parts)
    *from_state, state_gates = torch.split(tensors["from_state.weight"], parts)
    *biases, gates_bias = torch.split(tensors["from_state.bias"], parts)
    same = ("key", "first_hidden", "first_cell", "embedding", "state_output", "context_output", "vocabulary")
    return {
        **{name: tensor for name, tensor in tensors.items() if name.split(".")[0] in same},
        **{f"{n}.weight": torch.cat(pair, dim=1) for n, *pair in zip(names, from_word, from_state, strict=True)},
        **{f"{name}.bias": bias for name, bias in zip(names, biases, strict=True)},
        "energy.weight": tensors["energy"].unsqueeze(0),
        "cell.weight_ih": torch.cat([word_gates, tensors["context_gates.weight"]], dim=1),
        "cell.weight_hh": state_gates,
        "cell.bias_ih": gates_bias,
        "cell.bias_hh": torch.zeros_like(gates_bias),
    }
