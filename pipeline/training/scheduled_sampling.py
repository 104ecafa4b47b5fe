"""Scheduled sampling (Bengio et al. 2015, arXiv:1506.03099): the decoder reads some of its predictions in training.

All words are sampled in parallel (Duckworth et al. 2019, arXiv:1906.04331): a first pass reads the reference caption,
and words sampled from its logits replace some of the reference words in the second pass, which is trained.

Shapes: `B` images, `K` captions per image, `T` words, `V` vocabulary size.
"""

import torch
from torch import Tensor

from pipeline.captions.vocabulary import PAD, START


def mix_in_predictions(tokens: Tensor, logits: Tensor, sampling_probability: float) -> Tensor:
    """Replace words of the reference captions by words sampled from the decoder's predictions.

    Args:
        tokens: Ids that the decoder would read under teacher forcing [B, K, T].
        logits: Logits of all of these words but the first [B, K, T - 1, V]. They are modified in place.
        sampling_probability: Probability of replacing a word. `<start>` and `<pad>` are never replaced.

    Returns:
        Ids to read instead [B, K, T].
    """
    references = tokens[:, :, 1:]  # [B, K, T - 1]
    for token in (PAD, START):
        logits[..., token] = -torch.inf
    probs = logits.float().softmax(dim=-1).flatten(0, 2)  # [B * K * (T - 1), V]
    # What `torch.multinomial` does after checks for which it waits for a GPU.
    sampled = (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1).view_as(references)
    is_replaced = (torch.rand(references.shape, device=tokens.device) < sampling_probability) & (references != PAD)
    return torch.cat([tokens[:, :, :1], torch.where(is_replaced, sampled, references)], dim=2)
