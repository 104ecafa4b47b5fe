"""Search as a textbook has it: one image, one caption and one word at a time, in plain Python. Ours has to equal it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.captions.vocabulary import END, PAD, START, UNK
from pipeline.generation.search import SearchParams

Step = Callable[[int, Any], tuple[Sequence[float], Any, Any]]
"""Takes the last word and a state; returns every word's log-probability, the next state and the attention."""


@dataclass(frozen=True)
class Caption:
    """A caption, finished or in the making."""

    state: Any
    words: tuple[int, ...] = ()
    log_probability: float = 0.0
    attention: tuple[Any, ...] = ()
    reached_end: bool = False
    stuck: bool = False

    @property
    def over(self) -> bool:
        return self.reached_end or self.stuck


def textbook_search(step: Step, state: Any, image_id: int, params: SearchParams) -> list[Caption]:
    """The captions of one image, as `pipeline.generation.search.search` has to return them."""
    if params.method == "sample":
        return [sample(step, state, image_id, number, params) for number in range(params.n_best)]
    groups = [[Caption(state)] for _ in range(params.num_groups)]
    for _ in range(params.max_length):
        used: list[int] = []
        for number, group in enumerate(groups):
            candidates = []
            for caption in group:
                for word, longer in continuations(step, caption, params):
                    candidates.append(
                        (longer.log_probability - params.diversity_penalty * used.count(word), word, longer)
                    )
            candidates.sort(key=lambda candidate: candidate[0], reverse=True)
            best = candidates[: params.beam_size // params.num_groups]
            groups[number] = [longer for _, _, longer in best]
            used += [word for _, word, _ in best if word != PAD]
    distinct = {caption.words: caption for group in groups for caption in group}
    return sorted(distinct.values(), key=lambda caption: score(caption, params), reverse=True)[: params.n_best]


def sample(step: Step, state: Any, image_id: int, number: int, params: SearchParams) -> Caption:
    """One drawn caption of an image."""
    caption = Caption(state)
    for chance in np.random.default_rng([params.seed, image_id, number]).random(params.max_length):
        options = dict(continuations(step, caption, params))
        before = caption.log_probability
        weights = {
            word: math.exp((longer.log_probability - before) / params.temperature) for word, longer in options.items()
        }
        likely = sorted(weights, key=lambda word: weights[word], reverse=True)
        if params.top_k:
            likely = likely[: params.top_k]
        together = sum(weights[word] for word in likely)
        nucleus: list[int] = []
        while likely and sum(weights[word] for word in nucleus) < params.top_p * together:
            nucleus.append(likely.pop(0))
        left = chance * sum(weights[word] for word in nucleus)
        for word in nucleus:
            left -= weights[word]
            if left < 0:
                break
        caption = options[word]
    return caption


def continuations(step: Step, caption: Caption, params: SearchParams) -> Iterator[tuple[int, Caption]]:
    """What a caption may become, each with its new word; `<pad>` where it stays as it is."""
    if caption.over:
        yield PAD, caption
        return
    gains, state, attention = step(caption.words[-1] if caption.words else START, caption.state)
    looked = (*caption.attention, attention)
    possible = [word for word, gain in enumerate(gains) if gain > -math.inf and permitted(word, caption.words, params)]
    for word in possible:
        total = caption.log_probability + gains[word]
        if word == END:
            yield word, replace(caption, log_probability=total, reached_end=True)
        else:
            yield word, Caption(state, (*caption.words, word), total, looked)
    if not possible:
        yield PAD, replace(caption, stuck=True)


def permitted(word: int, before: tuple[int, ...], params: SearchParams) -> bool:
    """Whether a word may follow those before it."""
    if word in (PAD, START) or (word == UNK and not params.allow_unk):
        return False
    if word == END:
        return len(before) >= params.min_length
    size = params.no_repeat_ngram_size
    latest = (*before, word)[-size:]
    return not size or latest not in {before[first : first + size] for first in range(len(before) - size + 1)}


def score(caption: Caption, params: SearchParams) -> float:
    """What captions are ranked by."""
    length = max(1, len(caption.words) + caption.reached_end)
    match params.length_normalization:
        case "none":
            return caption.log_probability
        case "average":
            return caption.log_probability / length**params.length_alpha
        case "gnmt":
            return caption.log_probability / ((5 + length) / 6) ** params.length_alpha
