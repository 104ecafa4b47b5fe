"""What the reference implementations of all kinds of decoders share.

A reference implementation is a decoder in slow and readable code. Tests compare the two; benchmarks measure how much
faster the decoder is.

Shapes: `B` images, `K` captions per image, `N` captions of all images, `T` words, `P` regions, `C` channels, `D` region
size (C + 16), `A` attention size, `E` embedding size, `H` hidden size, `V` vocabulary size.
"""

from abc import ABC, abstractmethod
from typing import Generic

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.decoder.decoder import Decoder, S
from pipeline.decoder.non_local import NonLocalBlock


class NonLocalReference(nn.Module):
    """The non-local block, one region at a time (Wang et al. 2018, arXiv:1711.07971)."""

    def __init__(self, block: NonLocalBlock) -> None:
        super().__init__()
        region_size, size = block.theta.in_features, block.theta.out_features
        self.theta = nn.Linear(region_size, size)
        self.phi = nn.Linear(region_size, size)
        self.g = nn.Linear(region_size, size)
        self.w_z = nn.Linear(size, region_size, bias=False)

    def forward(self, regions: Tensor) -> Tensor:
        """Return the regions [B, P, D], each with what similar regions add to it."""
        scale = (self.theta.out_features * regions.shape[1]) ** 0.5
        outputs = []
        for region in regions.unbind(dim=1):  # [B, D]
            similarity = F.relu((self.theta(region).unsqueeze(1) * self.phi(regions)).sum(dim=2))  # [B, P]
            y = (similarity.unsqueeze(2) * self.g(regions)).sum(dim=1) / scale  # [B, N], eqs. 1, 4
            outputs.append(region + self.w_z(y))  # [B, D], eq. 6
        return torch.stack(outputs, dim=1)


class DecoderReference(nn.Module, ABC, Generic[S]):
    """Reference implementation with a copy of a decoder's weights.

    It decodes one word at a time, repeats the regions of an image for each of its captions, and precomputes nothing.
    Tensors of a state are [N, ...].
    """

    position_encoding: Tensor

    def __init__(self, decoder: Decoder) -> None:
        """Build what all kinds share; the layers of a kind follow, then `_copy_weights`.

        Args:
            decoder: The decoder, which must use neither word dropout nor region dropout.
        """
        super().__init__()
        if decoder.word_dropout.p or decoder.region_dropout.p:
            raise ValueError("the reference has neither word dropout nor region dropout")
        self.register_buffer("position_encoding", decoder.position_encoding, persistent=False)
        self.dropout = nn.Dropout(decoder.dropout.p)
        self.non_local = None if decoder.non_local is None else NonLocalReference(decoder.non_local)

    def _copy_weights(self, decoder: Decoder) -> None:
        self.to(decoder.position_encoding)
        weights = {name: weight.detach() for name, weight in decoder.named_parameters()}
        self.load_state_dict(self.convert_weights(weights))
        for module in self.modules():
            if isinstance(module, nn.LSTMCell):
                # The decoder has one bias where nn.LSTMCell adds two. The second stays 0.
                module.bias_hh.requires_grad_(False)

    def forward(self, grids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read whole captions and predict every next word.

        Args:
            grids: Grids [B, P, C] of any floating-point type.
            tokens: Ids of the words to read [B, K, T].

        Returns:
            Logits [B, K, T, V] and attention weights alpha [B, K, T, P].
        """
        regions = self.prepare(grids).repeat_interleave(tokens.shape[1], dim=0)  # [N, P, D], N = B * K
        state = self.init_state(regions)
        step_logits, step_alphas = [], []
        for words in tokens.flatten(0, 1).unbind(dim=1):  # [N]
            logits, state, alpha = self.decode_step(words, state, regions)
            step_logits.append(logits)
            step_alphas.append(alpha)
        logits, alpha = torch.stack(step_logits, dim=1), torch.stack(step_alphas, dim=1)  # [N, T, V], [N, T, P]
        return logits.view(*tokens.shape, -1), alpha.view(*tokens.shape, -1)

    def prepare(self, grids: Tensor) -> Tensor:
        """Return regions [B, P, D]: grids [B, P, C], layer-normalized, with a position encoding.

        The non-local block follows, if there is one.
        """
        normalized = F.layer_norm(grids.to(self.position_encoding.dtype), grids.shape[2:])  # [B, P, C]
        regions = torch.cat([normalized, self.position_encoding.expand(len(grids), -1, -1)], dim=-1)
        return regions if self.non_local is None else self.non_local(regions)

    @abstractmethod
    def init_state(self, regions: Tensor) -> S:
        """Compute the state before the first word from the regions [N, P, D]."""

    @abstractmethod
    def decode_step(self, tokens: Tensor, state: S, regions: Tensor) -> tuple[Tensor, S, Tensor]:
        """Read one word of each caption and predict the next.

        Args:
            tokens: Ids of the words to read [N].
            state: State before the step.
            regions: Regions of each caption's image [N, P, D].

        Returns:
            Logits [N, V], the next state, and attention weights alpha [N, P].
        """

    @staticmethod
    @abstractmethod
    def convert_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a decoder's weights, or their gradients, to the names and shapes of the reference."""
