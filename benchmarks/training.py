"""Training steps a second: the textbook's soft attention against ours, on the same batches in one run.

The textbook gives every caption a row of its own with a copy of its image's regions, computes attention keys anew at
every word, and takes one LSTM cell step and one vocabulary product a word.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.decoder.attention import AttentionDecoder, DecoderParams
from pipeline.decoder.objective import objective

IMAGES, CAPTIONS, WORDS, SIZE = 8, 5, 13, 512
CASES = [(7, 2048, 2500), (14, 256, 1100)]
ROUNDS = 3


class Textbook(nn.Module):
    """Show, Attend and Tell as tutorials have it."""

    def __init__(self, channels: int, words: int) -> None:
        super().__init__()
        self.key = nn.Linear(channels, SIZE)
        self.query = nn.Linear(SIZE, SIZE)
        self.energy = nn.Linear(SIZE, 1)
        self.gate = nn.Linear(SIZE, channels)
        self.embedding = nn.Embedding(words, SIZE)
        self.cell = nn.LSTMCell(SIZE + channels, SIZE)
        self.first_hidden = nn.Linear(channels, SIZE)
        self.first_cell = nn.Linear(channels, SIZE)
        self.vocabulary = nn.Linear(SIZE, words)

    def forward(self, regions: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        mean = regions.mean(dim=1)
        hidden, cell = self.first_hidden(mean), self.first_cell(mean)
        logits, attentions = [], []
        for embedded in self.embedding(words).unbind(dim=1):
            compared = F.relu(self.key(regions) + self.query(hidden).unsqueeze(1))
            attention = self.energy(compared).squeeze(-1).softmax(dim=-1)
            context = self.gate(hidden).sigmoid() * (regions * attention.unsqueeze(-1)).sum(dim=1)
            hidden, cell = self.cell(torch.cat([embedded, context], dim=1), (hidden, cell))
            logits.append(self.vocabulary(F.dropout(hidden, 0.5)))
            attentions.append(attention)
        return torch.stack(logits, dim=1), torch.stack(attentions, dim=1)


def steps(model: nn.Module, forward: Callable[[], tuple[Tensor, Tensor]], targets: Tensor) -> Callable[[], None]:
    """A function that takes one optimiser step."""
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-4)

    def step() -> None:
        logits, attention = forward()
        optimiser.zero_grad(set_to_none=True)
        objective(logits.view(*targets.shape, -1), attention.view(*targets.shape, -1), targets, 1.0).total.backward()
        optimiser.step()

    return step


def main() -> None:
    """Print captions a second of both, in turn, and the ratio of their medians."""
    print(f"training on {torch.get_num_threads()} threads, float32, state, embedding and attention of {SIZE}")
    print(f"{'regions x channels':>20} {'textbook':>10} {'gridcap':>10} {'ratio':>7}   captions a second")
    for side, channels, words in CASES:
        torch.manual_seed(0)
        grids = torch.rand(IMAGES, side * side, channels)
        tokens = torch.randint(4, words, (IMAGES, CAPTIONS, WORDS))
        copies, rows = grids.repeat_interleave(CAPTIONS, dim=0), tokens.flatten(0, 1)
        sizes = DecoderParams(embedding=SIZE, state=SIZE, attention=SIZE, dropout=0.5, word_dropout=0.0)
        textbook, ours = Textbook(channels, words), AttentionDecoder(sizes, (side, side), channels, words)
        slow = steps(textbook, lambda m=textbook, g=copies, t=rows: m(g, t), tokens)  # type: ignore[misc]
        fast = steps(ours, lambda m=ours, g=grids, t=tokens: m(g, t), tokens)  # type: ignore[misc]
        seconds: dict[str, list[float]] = {"slow": [], "fast": []}
        slow(), fast()
        for _ in range(ROUNDS):
            for name, step in (("slow", slow), ("fast", fast)):
                began = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - began)
        rates = [IMAGES * CAPTIONS / sorted(seconds[name])[ROUNDS // 2] for name in ("slow", "fast")]
        label = f"{side * side} x {channels}"
        print(f"{label:>20} {rates[0]:>10.0f} {rates[1]:>10.0f} {rates[1] / rates[0]:>7.1f}")
