"""Search for captions over an abstract step function, batched over images and beams.

Shapes: `B` images, `W` captions an image that are in the making, `T` words, `P` regions, `V` words known.

Beam search keeps the `W` likeliest beginnings of each image; those that have ended stay among them, as they stand, for
as long as nothing likelier pushes them out. An image whose captions can change no more leaves the batch. The other
images of a batch, and their number, have no say in a caption, but for the rounding of the decoder's products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.captions.vocabulary import END, PAD, START, UNK
from pipeline.generation.step_rules import Choice, beam_step, mask_forbidden, random_numbers, sample_step
from pipeline.params import params_section

S = TypeVar("S")

_LEAVE_AT = 0.8
"""Share of a batch's images still searched at which the others leave it: to leave, the rest is copied."""


class StepFunction(Protocol[S]):
    """What the search drives: a decoder, or several, with the images it describes; its state is its own affair."""

    def step(self, words: Tensor, state: S) -> tuple[Tensor, S, Tensor]:
        """Take the last words [B, W]; returns logits [B, W, V], the next state and attention [B, W, P]."""

    def select_beams(self, state: S, beams: Tensor) -> S:
        """Pick the state of the beams numbered [B, W'] within each image."""

    def select_images(self, state: S, images: Tensor) -> S:
        """Pick the state of the images numbered [B'], and all there is to know of them."""


@params_section
class SearchParams:
    """How captions are searched for."""

    method: Literal["beam", "sample"]
    """Whether a caption's words are the likeliest, or drawn at random, each by its probability."""
    beam_size: Annotated[int, Field(ge=1)]
    """Captions that are kept in view for each image; 1 is greedy search, and what method sample takes."""
    num_groups: Annotated[int, Field(ge=1)]
    """Equal parts of the beam that search apart, each shunning the words of those before it; 1 is plain beam search."""
    diversity_penalty: Annotated[float, Field(ge=0, le=1000)]
    """Nats that a word costs a group for each caption of the groups before it that has the word in the same place."""
    temperature: Annotated[float, Field(ge=0.01, le=100)]
    """What logits are divided by before words are drawn: below 1 likelier captions, above 1 more varied ones."""
    top_k: Annotated[int, Field(ge=0)]
    """Words are drawn from so many likeliest ones; 0 is all."""
    top_p: Annotated[float, Field(gt=0, le=1)]
    """Words are drawn from the fewest that together have this probability (a nucleus); 1 is all."""
    seed: Annotated[int, Field(ge=0)]
    """Fixes, together with an image's id, what is drawn for the image."""
    min_length: Annotated[int, Field(ge=0)]
    """Words before which a caption does not end."""
    max_length: Annotated[int, Field(ge=1)]
    """Words at which a caption ends, if it has not ended by itself."""
    length_normalization: Literal["none", "average", "gnmt"]
    """What log-probabilities are divided by to rank captions: nothing, length or (5 + length) / 6, to the power below;
    length counts the end."""
    length_alpha: Annotated[float, Field(ge=0, le=1)]
    """That power: 0 favors short captions, 1 long ones."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)]
    """Length of sequences of words that may not come twice in a caption; 0 blocks none."""
    allow_unk: bool
    """Whether `<unk>` may stand in a caption."""
    n_best: Annotated[int, Field(ge=1)]
    """Captions found for each image: the best of the beam, the best first, or so many drawn ones, as they come."""
    precision: Literal["float32", "bfloat16"]
    """Of the decoder's products of matrices: bfloat16 is faster and less exact."""

    def __post_init__(self) -> None:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length must be at most max_length, {self.max_length}, got {self.min_length}")
        if self.length_normalization == "none" and self.length_alpha:
            raise ValueError(
                f"length_alpha must be 0 with length_normalization none, got {self.length_alpha}; set it to 0, or "
                "length_normalization to average or gnmt"
            )
        if self.method == "sample":
            self._require_off(
                {"beam_size": 1, "num_groups": 1}, "method sample draws each caption apart; n_best says how many"
            )
        else:
            self._require_off(
                {"temperature": 1, "top_k": 0, "top_p": 1}, "method beam draws nothing; or set method to sample"
            )
            if self.beam_size % self.num_groups:
                raise ValueError(f"groups must divide beam, {self.beam_size}, got {self.num_groups}")
            if self.n_best > self.beam_size:
                raise ValueError(
                    f"n_best must be at most beam, {self.beam_size}, got {self.n_best}; a wider beam finds more"
                )
        if self.num_groups == 1:
            self._require_off({"diversity_penalty": 0}, "it is between groups; set groups to 2 or more")

    def _require_off(self, neutral: dict[str, float], reason: str) -> None:
        for key, value in neutral.items():
            if getattr(self, key) != value:
                raise ValueError(f"{key} must be {value}, got {getattr(self, key)}: {reason}")

    def divisor(self, length: Tensor) -> Tensor:
        """What the log-probability of captions of this length, `<end>` included, is divided by."""
        match self.length_normalization:
            case "none":
                return torch.ones_like(length)
            case "average":
                return length**self.length_alpha
            case "gnmt":
                return ((5 + length) / 6) ** self.length_alpha

    @classmethod
    def greedy(cls, max_length: int) -> "SearchParams":
        """The likeliest word each time, and nothing else."""
        return cls(
            method="beam",
            beam_size=1,
            num_groups=1,
            diversity_penalty=0.0,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            seed=0,
            min_length=0,
            max_length=max_length,
            length_normalization="none",
            length_alpha=0.0,
            no_repeat_ngram_size=0,
            allow_unk=False,
            n_best=1,
            precision="float32",
        )


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One generated caption."""

    words: tuple[int, ...]
    """Ids, without `<start>` and `<end>`."""
    log_probability: float
    """Sum over the words, and `<end>` where it was reached, in nats, as the decoder has them."""
    score: float
    """What captions are ranked by: `log_probability` over the length penalty."""
    word_log_probabilities: tuple[float, ...]
    """Of each word, those before it given, in nats; the end is left out."""
    attention: Tensor
    """[T, P]: where the decoder looked for each of the words."""


def search(
    step_function: StepFunction[S], state: S, image_ids: Sequence[int], params: SearchParams, device: torch.device
) -> list[list[Hypothesis]]:
    """Find captions; returns for each image up to `params.n_best`, one at least, the best first (drawn ones as drawn).

    `state` is that of one beam an image. A caption ends with `<end>`, after `max_length` words, or as it stands where no
    word may follow, since each is barred or has probability 0. What two groups find alike is returned once.
    """
    sampled = params.method == "sample"
    width = params.n_best if sampled else params.num_groups
    chances = random_numbers(params.seed, image_ids, width, params.max_length).to(device) if sampled else None
    beams = _Beams.start(len(image_ids), width, device)
    state = step_function.select_beams(state, torch.zeros_like(beams.words))
    found: dict[int, list[Hypothesis]] = {}
    for step in range(params.max_length):
        logits, state, attention = step_function.step(beams.words, state)
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        mask_forbidden(log_probs, beams.sentences, params.no_repeat_ngram_size, _never(params, step))
        if chances is None:
            choice = beam_step(
                log_probs, beams.totals, beams.ended, params.beam_size, params.num_groups, params.diversity_penalty
            )
        else:
            chance = chances[beams.places, :, step]
            choice = sample_step(log_probs, beams.ended, chance, params.temperature, params.top_k, params.top_p)
        beams.append(choice, attention)
        state = step_function.select_beams(state, choice.parents)
        finished_images = beams.is_finished(params)
        if bool(finished_images.all()):
            break
        staying = (~finished_images).nonzero().flatten()
        if len(staying) <= _LEAVE_AT * len(finished_images):
            found |= beams.select_images(finished_images.nonzero().flatten()).ranked(params)
            beams, state = beams.select_images(staying), step_function.select_images(state, staying)
    found |= beams.ranked(params)
    return [found[place] for place in range(len(image_ids))]


def pick_beams(values: Tensor, beams: Tensor) -> Tensor:
    """Pick the values [B, W, ...] of the beams numbered [B, W']: [B, W', ...]."""
    index = beams.view(*beams.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


def _never(params: SearchParams, step: int) -> list[int]:
    """Ids that may not come now, whatever came before."""
    never = [PAD, START]
    if not params.allow_unk:
        never.append(UNK)
    if step < params.min_length:
        never.append(END)
    return never


@dataclass
class _Beams:
    """Captions in the making."""

    places: Tensor
    """[B]: which of all images these are."""
    sentences: Tensor
    """[B, W, 1 + T]: `<start>` and the words; behind a caption's end `<pad>`."""
    log_probs: Tensor
    """[B, W, T]: log-probability of each word, and of the end."""
    totals: Tensor
    """[B, W]: their sum."""
    ended: Tensor
    """[B, W]"""
    looks: list[tuple[Tensor, Tensor]]
    """For each word the attention [B, W', P] with which it was chosen, and the beams [B, W] whose attention it is."""

    @classmethod
    def start(cls, images: int, width: int, device: torch.device) -> "_Beams":
        return cls(
            places=torch.arange(images, device=device),
            sentences=torch.full((images, width, 1), START, device=device),
            log_probs=torch.zeros(images, width, 0, device=device),
            totals=torch.zeros(images, width, device=device),
            ended=torch.zeros(images, width, dtype=torch.bool, device=device),
            looks=[],
        )

    @property
    def words(self) -> Tensor:
        """[B, W]: the last of each caption."""
        return self.sentences[..., -1]

    @property
    def steps(self) -> Tensor:
        """[B, W]: the words of each caption and its end, if it was reached; one at least."""
        return (self.sentences[..., 1:] != PAD).sum(dim=-1).clamp(min=1)

    def append(self, choice: Choice, attention: Tensor) -> None:
        """Add a word to each caption."""
        parents, words, log_probs = choice
        self.sentences = torch.cat([pick_beams(self.sentences, parents), words.unsqueeze(-1)], dim=-1)
        self.log_probs = torch.cat([pick_beams(self.log_probs, parents), log_probs.unsqueeze(-1)], dim=-1)
        self.totals = self.totals.gather(1, parents) + log_probs
        self.ended = self.ended.gather(1, parents) | (words == END) | (words == PAD)
        # Followed back in the end: to sort all of it by the new beams would copy it once a word.
        self.looks.append((attention, parents))

    def is_finished(self, params: SearchParams) -> Tensor:
        """[B]: whether what will be returned of an image is known.

        It is when all has ended. In a plain beam it is also when enough captions have ended that score above all that
        the others can come to: a log-probability only falls, and is divided by no more than at `max_length`. None of
        those can then be pushed out, since each is also likelier than what goes on.
        """
        finished = self.ended.all(dim=1)
        if params.method == "sample" or params.num_groups > 1 or params.n_best > self.totals.shape[1]:
            return finished
        scores = (self.totals / params.divisor(self.steps)).masked_fill(~self.ended, -torch.inf)
        most = self.totals / params.divisor(torch.full_like(self.totals, params.max_length))
        bound = most.masked_fill(self.ended, -torch.inf).amax(dim=1)
        return finished | (scores.topk(params.n_best, dim=1).values[:, -1] > bound)

    def select_images(self, images: Tensor) -> "_Beams":
        return _Beams(
            places=self.places[images],
            sentences=self.sentences[images],
            log_probs=self.log_probs[images],
            totals=self.totals[images],
            ended=self.ended[images],
            looks=[(attention[images], parents[images]) for attention, parents in self.looks],
        )

    def ranked(self, params: SearchParams) -> dict[int, list[Hypothesis]]:
        """What is returned of each image, by its place."""
        scores = (self.totals.double() / params.divisor(self.steps.double())).tolist()
        sentences, log_probs, totals = self.sentences[..., 1:].tolist(), self.log_probs.tolist(), self.totals.tolist()
        chosen = [_best(*image, params) for image in zip(sentences, scores, strict=True)]
        most = max(map(len, chosen))
        maps = self._attention(torch.tensor([beams + [0] * (most - len(beams)) for beams in chosen]))
        return {
            place: [
                Hypothesis(
                    words=(words := _words(sentences[image][beam])),
                    log_probability=totals[image][beam],
                    score=scores[image][beam],
                    word_log_probabilities=tuple(log_probs[image][beam][: len(words)]),
                    attention=maps[image, rank, : len(words)],
                )
                for rank, beam in enumerate(chosen[image])
            ]
            for image, place in enumerate(self.places.tolist())
        }

    def _attention(self, beams: Tensor) -> Tensor:
        """[B, W', T, P] of the captions numbered [B, W'], followed back from their last word to the first."""
        beams = beams.to(self.places.device)
        maps = []
        for attention, parents in reversed(self.looks):
            beams = parents.gather(1, beams)
            maps.append(pick_beams(attention, beams))
        return torch.stack(maps[::-1], dim=2).float().cpu()


def _best(sentences: list[list[int]], scores: list[float], params: SearchParams) -> list[int]:
    """Numbers of the captions to return of an image."""
    if params.method == "sample":
        return list(range(len(sentences)))
    ranking = sorted((beam for beam, score in enumerate(scores) if score > -torch.inf), key=lambda beam: -scores[beam])
    distinct = {_words(sentences[beam]): beam for beam in reversed(ranking)}
    return sorted(distinct.values(), key=ranking.index)[: params.n_best]


def _words(sentence: list[int]) -> tuple[int, ...]:
    return tuple(word for word in sentence if word not in (END, PAD))
