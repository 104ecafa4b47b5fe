"""Rules of one search step: which words are forbidden, and how beam search and sampling choose among the allowed ones.

Shapes: `B` images, `K` captions per image (beams or samples), `T` words so far, `V` vocabulary size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.captions.vocabulary import PAD


class Continuations(NamedTuple):
    """Continuations that a step chose. A caption that has ended, or that no word may follow, continues with `<pad>`."""

    beam_index: Tensor
    """Beam that each one continues [B, K']."""
    tokens: Tensor
    """Token that each one appends [B, K']."""
    log_probs: Tensor
    """Log-probability of each token [B, K']: 0 for `<pad>`, or minus infinity for a beam without continuation."""


def mask_forbidden(log_probs: Tensor, tokens: Tensor, no_repeat_ngram_size: int, forbidden: list[int]) -> None:
    """Set the log-probabilities of forbidden words to minus infinity, in place.

    Args:
        log_probs: Log-probabilities of the next word [B, K, V].
        tokens: Captions so far [B, K, 1 + T], starting with `<start>`.
        no_repeat_ngram_size: Size of n-grams that may occur only once in a caption; 0 disables it.
        forbidden: Token ids forbidden at this step. Must contain `<pad>`.
    """
    for token in forbidden:
        log_probs[..., token] = -torch.inf
    n = no_repeat_ngram_size
    if 0 < n <= tokens.shape[-1]:
        ngrams = tokens.unfold(-1, n, 1)  # [B, K, T + 2 - n, n]
        prefix = tokens[..., tokens.shape[-1] - n + 1 :]  # [B, K, n - 1]
        would_repeat = (ngrams[..., :-1] == prefix.unsqueeze(2)).all(dim=-1)  # [B, K, T + 2 - n]
        log_probs.scatter_(2, ngrams[..., -1].masked_fill(~would_repeat, PAD), -torch.inf)


def beam_step(
    log_probs: Tensor,
    total_log_probs: Tensor,
    ended: Tensor,
    beam_size: int,
    num_groups: int,
    diversity_penalty: float,
) -> Continuations:
    """Choose the most likely continuations: `beam_size` in all, an equal share for each group.

    Diverse beam search with Hamming diversity (Vijayakumar et al. 2016, arXiv:1610.02424): groups choose one after
    another, and a word is penalized for each caption of an earlier group that chose it at this step. The penalty
    affects the choice only, not the returned log-probabilities.

    Args:
        log_probs: Log-probabilities of the next word [B, K, V]. Beams of one group are adjacent.
        total_log_probs: Log-probabilities of the captions so far [B, K].
        ended: Whether a caption has ended [B, K].
        beam_size: Maximum number of continuations, K'.
        num_groups: Number of groups; divides K and `beam_size`.
        diversity_penalty: Penalty in nats.

    Returns:
        The continuations, those of one group adjacent.
    """
    group_size = log_probs.shape[1] // num_groups
    times_chosen = log_probs.new_zeros(len(log_probs), log_probs.shape[-1]) if num_groups > 1 else None  # [B, V]
    groups = []
    for group in range(num_groups):
        beams = slice(group * group_size, (group + 1) * group_size)
        penalty = None if times_chosen is None else diversity_penalty * times_chosen
        chosen = _group_step(
            log_probs[:, beams], total_log_probs[:, beams], ended[:, beams], beam_size // num_groups, penalty
        )
        groups.append(chosen._replace(beam_index=chosen.beam_index + beams.start))
        if times_chosen is not None:
            # Counts `<pad>` too, whose penalty has no effect.
            times_chosen.scatter_add_(1, chosen.tokens, torch.ones_like(chosen.log_probs))
    return Continuations(*(torch.cat(parts, dim=1) for parts in zip(*groups, strict=True)))


def _group_step(
    log_probs: Tensor, total_log_probs: Tensor, ended: Tensor, beam_size: int, penalty: Tensor | None
) -> Continuations:
    """Choose the continuations of one group; `penalty` is [B, V] or None."""
    k = min(beam_size, log_probs.shape[-1])
    penalized = log_probs if penalty is None else log_probs - penalty.unsqueeze(1)  # [B, K, V]
    scores, tokens = penalized.topk(k, dim=-1)  # [B, K, k]
    # A caption that has ended, or that no word may follow, continues with `<pad>` and keeps its log-probability.
    final = ended | (scores[..., 0] == -torch.inf)  # [B, K]
    scores.masked_fill_(final.unsqueeze(-1), -torch.inf)[..., 0].masked_fill_(final, 0.0)
    tokens.masked_fill_(final.unsqueeze(-1), PAD)
    total_scores = (total_log_probs.unsqueeze(-1) + scores).flatten(1)  # [B, K * k]
    chosen = total_scores.topk(min(beam_size, total_scores.shape[1]), dim=1).indices  # [B, K']
    beam_index = chosen // k
    scores, tokens = scores.flatten(1).gather(1, chosen), tokens.flatten(1).gather(1, chosen)  # [B, K']
    # With fewer continuations than `beam_size`, the remaining beams have minus infinity.
    tokens.masked_fill_(scores == -torch.inf, PAD)
    unpenalized = log_probs.flatten(1).gather(1, beam_index * log_probs.shape[-1] + tokens)  # [B, K']
    return Continuations(beam_index, tokens, torch.where(tokens == PAD, scores, unpenalized))


def sample_step(
    log_probs: Tensor, ended: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float
) -> Continuations:
    """Sample the next word of each caption.

    Temperature, top-k and nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751), in this order. They affect the
    choice only, not the returned log-probabilities.

    Args:
        log_probs: Log-probabilities of the next word [B, K, V].
        ended: Whether a caption has ended [B, K].
        uniform: Uniform random numbers in [0, 1) [B, K], each of which selects a word by cumulative probability, in
            descending order of probability with top-k or nucleus sampling, otherwise in the order of ids.
        temperature: Divisor of the log-probabilities.
        top_k: Sample from the k most likely words; 0 disables it.
        top_p: Sample from the smallest set of words whose probabilities add up to this; 1 disables it.

    Returns:
        One continuation per caption.
    """
    scaled = log_probs / temperature
    if top_k or top_p < 1:
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)  # [B, K, V]
        if top_k:
            scaled[..., top_k:] = -torch.inf
        probabilities, cumulative = _cumulate(scaled)
        last = ((cumulative - probabilities) < top_p).sum(dim=-1, keepdim=True).clamp(min=1) - 1  # [B, K, 1]
        tokens = order.gather(-1, _select(cumulative, uniform, last))  # [B, K, 1]
    else:  # without sorting, which takes most of the time with a large vocabulary
        _, cumulative = _cumulate(scaled)
        # The last word with a probability above 0. No word has one if all are forbidden.
        last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous()).clamp(max=log_probs.shape[-1] - 1)
        tokens = _select(cumulative, uniform, last)
    token_log_probs = log_probs.gather(-1, tokens).squeeze(-1)  # [B, K]
    final = ended | (token_log_probs == -torch.inf)
    beam_index = torch.arange(log_probs.shape[1], device=log_probs.device).expand(len(log_probs), -1)
    return Continuations(
        beam_index, tokens.squeeze(-1).masked_fill(final, PAD), token_log_probs.masked_fill(final, 0.0)
    )


def _cumulate(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities [B, K, V] and their cumulative sums, both in float64."""
    probabilities = log_probs.double().softmax(dim=-1)
    if log_probs.device.type == "cpu":
        return probabilities, probabilities.cumsum(dim=-1)
    return probabilities, fixed_point_cumsum(probabilities)


def fixed_point_cumsum(probabilities: Tensor) -> Tensor:
    """Sum probabilities [..., V] cumulatively, to 2^-52. On a GPU, `cumsum` of floats may differ from run to run."""
    return (probabilities * 2.0**52).round().long().cumsum(dim=-1).double() * 2.0**-52


def _select(cumulative: Tensor, uniform: Tensor, last: Tensor) -> Tensor:
    """Select an index up to `last` [B, K, 1] by cumulative probability [B, K, V] and random numbers [B, K]."""
    threshold = uniform.unsqueeze(-1) * cumulative.gather(-1, last)
    return torch.searchsorted(cumulative, threshold, right=True).minimum(last)


def random_numbers(seed: int, image_ids: Sequence[int], num_samples: int, max_length: int) -> Tensor:
    """Draw the uniform random numbers [B, num_samples, max_length] of `sample_step`.

    Each depends only on the seed, the id of the image, the sample and the step, so samples do not depend on the batch.
    """
    rows = [
        np.random.default_rng([seed, image_id % 2**64, sample]).random(max_length)
        for image_id in image_ids
        for sample in range(num_samples)
    ]
    return torch.from_numpy(np.array(rows)).view(len(image_ids), num_samples, max_length)
