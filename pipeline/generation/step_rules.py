"""How a search chooses the next word: what is barred, what is likeliest, and what chance draws.

Shapes: `B` images, `W` captions an image that are in the making, `T` words, `V` words known.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.captions.vocabulary import PAD


class Choice(NamedTuple):
    """The captions that go on, each [B, W']. One that has ended, or that no word may follow, goes on with `<pad>`."""

    parents: Tensor
    """Which of the captions before it each continues."""
    words: Tensor
    log_probs: Tensor
    """Log-probabilities of the words; of `<pad>` 0, or minus infinity where there is nothing to go on with."""


def mask_forbidden(log_probs: Tensor, sentences: Tensor, block: int, never: list[int]) -> None:
    """Set log-probabilities [B, W, V] to minus infinity: of the ids `never`, and of what would repeat a sequence.

    With `block` above 0, no `block` words may stand twice in a row in the sentences [B, W, T].
    """
    log_probs[..., never] = -torch.inf
    if 0 < block <= sentences.shape[-1]:
        sequences = sentences.unfold(-1, block, 1)  # [B, W, T - block + 1, block]
        latest = sentences[..., sentences.shape[-1] - block + 1 :]
        same = (sequences[..., :-1] == latest.unsqueeze(2)).all(dim=-1)
        log_probs.scatter_(2, sequences[..., -1].masked_fill(~same, PAD), -torch.inf)


def beam_step(log_probs: Tensor, totals: Tensor, ended: Tensor, width: int, groups: int, diversity: float) -> Choice:
    """Choose the `width` likeliest continuations, in equal parts for each group of captions.

    Takes log-probabilities of words [B, W, V] and of captions [B, W], and which have ended [B, W]; groups lie beside
    each other in W. Diverse beam search (Vijayakumar et al. 2016, arXiv:1610.02424): a group chooses as if a word were
    less likely by `diversity` nats for each caption of the groups before it that has just chosen the word (Hamming
    diversity). Gains are without that.
    """
    own = log_probs.shape[1] // groups
    used = log_probs.new_zeros(len(log_probs), log_probs.shape[-1]) if groups > 1 else None
    choices = []
    for group in range(groups):
        part = slice(group * own, (group + 1) * own)
        cost = None if used is None else diversity * used
        choice = _group_step(log_probs[:, part], totals[:, part], ended[:, part], width // groups, cost)
        choices.append(choice._replace(parents=choice.parents + part.start))
        if used is not None:
            used.scatter_add_(1, choice.words, torch.ones_like(choice.log_probs))  # of `<pad>` too, which costs nothing
    return Choice(*(torch.cat(parts, dim=1) for parts in zip(*choices, strict=True)))


def _group_step(log_probs: Tensor, totals: Tensor, ended: Tensor, width: int, cost: Tensor | None) -> Choice:
    few = min(width, log_probs.shape[-1])
    worth, words = (log_probs if cost is None else log_probs - cost.unsqueeze(1)).topk(few, dim=-1)  # [B, W, few]
    over = ended | (worth[..., 0] == -torch.inf)
    worth.masked_fill_(over.unsqueeze(-1), -torch.inf)[..., 0].masked_fill_(over, 0.0)
    words.masked_fill_(over.unsqueeze(-1), PAD)
    joint = (totals.unsqueeze(-1) + worth).flatten(1)
    places = joint.topk(min(width, joint.shape[1]), dim=1).indices
    parents = places // few
    worth, words = worth.flatten(1).gather(1, places), words.flatten(1).gather(1, places)
    # Where there are fewer continuations than the beam is wide, the rest of it is dead.
    words.masked_fill_(worth == -torch.inf, PAD)
    chosen = log_probs.flatten(1).gather(1, parents * log_probs.shape[-1] + words)
    return Choice(parents, words, torch.where(words == PAD, worth, chosen))


def sample_step(
    log_probs: Tensor, ended: Tensor, chances: Tensor, temperature: float, top_k: int, top_p: float
) -> Choice:
    """Draw a word for each caption, by chances [B, W] between 0 and 1.

    Takes log-probabilities [B, W, V] and which captions have ended [B, W]. They are divided by `temperature`; then the
    `top_k` likeliest words stay (0: all), and of these the fewest that have the probability `top_p` together, a nucleus
    (Holtzman et al. 2020, arXiv:1904.09751). Gains are without all that.
    """
    ranked, order = (log_probs / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k:
        ranked[..., top_k:] = -torch.inf
    probabilities = ranked.double().softmax(dim=-1)
    # On a GPU no two runs need add up alike.
    join_relative = probabilities.cpu().cumsum(dim=-1).to(log_probs.device)
    nucleus = ((join_relative - probabilities) < top_p).sum(dim=-1, keepdim=True).clamp(min=1)  # words in it
    wanted = chances.unsqueeze(-1) * join_relative.gather(-1, nucleus - 1)
    place = torch.searchsorted(join_relative, wanted, right=True).minimum(nucleus - 1)
    words = order.gather(-1, place)
    found = log_probs.gather(-1, words).squeeze(-1)
    over = ended | (found == -torch.inf)
    parents = torch.arange(log_probs.shape[1], device=log_probs.device).expand(len(log_probs), -1)
    return Choice(parents, words.squeeze(-1).masked_fill(over, PAD), found.masked_fill(over, 0.0))


def random_numbers(seed: int, image_ids: Sequence[int], captions: int, words: int) -> Tensor:
    """Numbers between 0 and 1, [B, captions, words], that only the seed, an image's id and the two places decide."""
    rows = [
        np.random.default_rng([seed, image_id % 2**64, caption]).random(words)
        for image_id in image_ids
        for caption in range(captions)
    ]
    return torch.from_numpy(np.array(rows)).view(len(image_ids), captions, words)
