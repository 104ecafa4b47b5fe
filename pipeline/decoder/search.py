"""Search for captions over an abstract step function, batched over images and beams.

Shapes: `B` images, `W` beams, `T` words, `P` regions, `V` words known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.captions.vocabulary import END, PAD, START, UNKNOWN
from pipeline.params import section

S = TypeVar("S")

Step = Callable[[Tensor, S], tuple[Tensor, S, Tensor]]
"""Takes the last words [B, W] and a state; returns logits [B, W, V], the next state and attention [B, W, P]."""
Choose = Callable[[S, Tensor], S]
"""Takes a state and beam numbers [B, W']; returns the state of those beams."""


@section
class SearchParams:
    """How captions are searched for."""

    beam: Annotated[int, Field(ge=1)]
    """Captions that are kept in view for each image; 1 is greedy search."""
    max_words: Annotated[int, Field(ge=1)]
    """Words at which a caption ends, if it has not ended by itself."""
    length_exponent: Annotated[float, Field(ge=0, le=1)]
    """Captions are ranked by log-probability divided by length to this power: 0 favours short ones, 1 long ones."""
    allow_unknown: bool
    """Whether `<unk>` may stand in a caption."""


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One generated caption."""

    words: tuple[int, ...]
    """Ids, without `<start>` and `<end>`."""
    log_probability: float
    """Sum over the words, and `<end>` where it was reached, in nats."""
    score: float
    """What captions are ranked by: `log_probability` divided by a power of the length, `<end>` included."""
    attention: Tensor
    """[T, P]: where the decoder looked for each of the words."""


def search(
    step: Step[S], choose: Choose[S], state: S, images: int, params: SearchParams, device: torch.device
) -> list[list[Hypothesis]]:
    """Find captions by beam search; returns for each image its beams, the best first, one at least.

    `state` is that of one beam an image. A beam that reaches `<end>` stays in the beam with its score, so the search
    ends when every beam has ended or after `max_words` words, whichever is first; a caption that never reaches
    `<end>` is returned as it stands then.
    """
    forbidden = [PAD, START] if params.allow_unknown else [PAD, START, UNKNOWN]
    words = torch.full((images, 1), START, device=device)
    totals = torch.zeros(images, 1, device=device)
    ended = torch.zeros(images, 1, dtype=torch.bool, device=device)
    sentence = words.new_zeros(images, 1, 0)
    looked: Tensor | None = None
    for _ in range(params.max_words):
        logits, state, attention = step(words, state)
        gains = logits.float().log_softmax(dim=-1)
        gains[..., forbidden] = -torch.inf
        gains.masked_fill_(ended.unsqueeze(-1), -torch.inf)
        gains[..., END].masked_fill_(ended, 0.0)
        candidates = (totals.unsqueeze(-1) + gains).flatten(1)  # [B, W * V]
        totals, places = candidates.topk(min(params.beam, candidates.shape[1]), dim=1)
        parents = places // logits.shape[-1]  # [B, W]
        words = places % logits.shape[-1]
        ended = ended.gather(1, parents) | (words == END)
        state = choose(state, parents)
        sentence = torch.cat([of_beams(sentence, parents), words.unsqueeze(-1)], dim=-1)
        seen = attention.unsqueeze(2)
        looked = of_beams(seen if looked is None else torch.cat([looked, seen], dim=2), parents)
        if bool(ended.all()):
            break
    assert looked is not None
    return _ranked(sentence.cpu(), totals.cpu(), looked.float().cpu(), params)


def of_beams(values: Tensor, beams: Tensor) -> Tensor:
    """Pick the values [B, W, ...] of the beams numbered [B, W']: [B, W', ...]."""
    index = beams.view(*beams.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


def _ranked(sentence: Tensor, totals: Tensor, looked: Tensor, params: SearchParams) -> list[list[Hypothesis]]:
    found = []
    for rows, sums, maps in zip(sentence.tolist(), totals.tolist(), looked, strict=True):
        beams = []
        for row, total, attention in zip(rows, sums, maps, strict=True):
            if total == -torch.inf:
                continue
            length = row.index(END) if END in row else len(row)
            steps = min(length + 1, len(row))
            beams.append(
                Hypothesis(
                    words=tuple(row[:length]),
                    log_probability=total,
                    score=total / steps**params.length_exponent,
                    attention=attention[:length],
                )
            )
        found.append(sorted(beams, key=lambda beam: -beam.score))
    return found
