"""Layers without weights that all kinds of decoders use."""

import torch
from torch import Tensor, nn


class Dropout(nn.Module):
    """Dropout whose mask is cheaper to draw on a CPU than that of `nn.Dropout`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        """Probability of zeroing a value."""

    def forward(self, values: Tensor) -> Tensor:
        """Zero values with probability `p` and scale the others by 1 / (1 - p); in evaluation mode, change nothing."""
        if not self.training or not self.p:
            return values
        mask = torch.rand(values.shape, device=values.device) >= self.p
        return values * (mask.to(values.dtype) / (1 - self.p))


def lstm_step(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the next state of an LSTM.

    Args:
        gates: Sum of the projections of input and hidden state to the input gate, forget gate, candidate and output
            gate [..., 4H].
        c: Cell state before the step [..., H].

    Returns:
        The next hidden state and the next cell state, both [..., H].
    """
    input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=-1)  # [..., H] each
    c = forget_gate.sigmoid() * c + input_gate.sigmoid() * candidate.tanh()
    return output_gate.sigmoid() * c.tanh(), c
