"""Reference search: one image, one caption and one word at a time, in plain Python.

`pipeline.generation.search.search` must return the same captions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.captions.vocabulary import END, PAD, START, UNK
from pipeline.generation.search import SearchParams

Step = Callable[[int, Any], tuple[Sequence[float], Any, Any]]
"""Takes the last token and a state; returns every token's log-probability, the next state and the attention."""


@dataclass(frozen=True)
class Hypothesis:
    """A caption, complete or not."""

    state: Any
    tokens: tuple[int, ...] = ()
    log_probability: float = 0.0
    attention: tuple[Any, ...] = ()
    reached_end: bool = False
    stuck: bool = False
    """No token may follow."""

    @property
    def finished(self) -> bool:
        return self.reached_end or self.stuck


def reference_search(step: Step, state: Any, image_id: int, params: SearchParams) -> list[Hypothesis]:
    """Return the captions of one image."""
    if params.method == "sample":
        return [sample(step, state, image_id, index, params) for index in range(params.n_best)]
    groups = [[Hypothesis(state)] for _ in range(params.num_groups)]
    for _ in range(params.max_length):
        chosen_tokens: list[int] = []
        for index, group in enumerate(groups):
            candidates = []
            for hypothesis in group:
                for token, continuation in continuations(step, hypothesis, params):
                    penalty = params.diversity_penalty * chosen_tokens.count(token)
                    candidates.append((continuation.log_probability - penalty, token, continuation))
            candidates.sort(key=lambda candidate: candidate[0], reverse=True)
            best = candidates[: params.beam_size // params.num_groups]
            groups[index] = [continuation for _, _, continuation in best]
            chosen_tokens += [token for _, token, _ in best if token != PAD]
    distinct = {hypothesis.tokens: hypothesis for group in groups for hypothesis in group}
    ranked = sorted(distinct.values(), key=lambda hypothesis: score(hypothesis, params), reverse=True)
    return ranked[: params.n_best]


def sample(step: Step, state: Any, image_id: int, index: int, params: SearchParams) -> Hypothesis:
    """Draw one caption."""
    hypothesis = Hypothesis(state)
    for uniform in np.random.default_rng([params.seed, image_id, index]).random(params.max_length):
        options = dict(continuations(step, hypothesis, params))
        weights = {
            token: math.exp((continuation.log_probability - hypothesis.log_probability) / params.temperature)
            for token, continuation in options.items()
        }
        # Without truncation, the vocabulary keeps its order.
        is_truncated = params.top_k > 0 or params.top_p < 1
        ranked = sorted(weights, key=lambda token: weights[token] if is_truncated else -token, reverse=True)
        if params.top_k:
            ranked = ranked[: params.top_k]
        total = sum(weights[token] for token in ranked)
        nucleus: list[int] = []
        while ranked and sum(weights[token] for token in nucleus) < params.top_p * total:
            nucleus.append(ranked.pop(0))
        remaining = uniform * sum(weights[token] for token in nucleus)
        for token in nucleus:
            remaining -= weights[token]
            if remaining < 0:
                break
        hypothesis = options[token]
    return hypothesis


def continuations(step: Step, hypothesis: Hypothesis, params: SearchParams) -> Iterator[tuple[int, Hypothesis]]:
    """Yield every continuation with its token; a finished hypothesis continues unchanged with `<pad>`."""
    if hypothesis.finished:
        yield PAD, hypothesis
        return
    last_token = hypothesis.tokens[-1] if hypothesis.tokens else START
    log_probs, state, attention = step(last_token, hypothesis.state)
    possible = [
        token
        for token, log_prob in enumerate(log_probs)
        if log_prob > -math.inf and is_allowed(token, hypothesis.tokens, params)
    ]
    for token in possible:
        total = hypothesis.log_probability + log_probs[token]
        if token == END:
            yield token, replace(hypothesis, log_probability=total, reached_end=True)
        else:
            tokens = (*hypothesis.tokens, token)
            yield token, Hypothesis(state, tokens, total, (*hypothesis.attention, attention))
    if not possible:
        yield PAD, replace(hypothesis, stuck=True)


def is_allowed(token: int, previous: tuple[int, ...], params: SearchParams) -> bool:
    """Whether a token may follow the previous ones."""
    if token in (PAD, START) or (token == UNK and not params.allow_unk):
        return False
    if token == END:
        return len(previous) >= params.min_length
    n = params.no_repeat_ngram_size
    ngram = (*previous, token)[-n:]
    return not n or ngram not in {previous[start : start + n] for start in range(len(previous) - n + 1)}


def score(hypothesis: Hypothesis, params: SearchParams) -> float:
    """Return the length-normalized log-probability."""
    length = max(1, len(hypothesis.tokens) + hypothesis.reached_end)
    match params.length_normalization:
        case "none":
            return hypothesis.log_probability
        case "average":
            return hypothesis.log_probability / length**params.length_alpha
        case "gnmt":
            return hypothesis.log_probability / ((5 + length) / 6) ** params.length_alpha
