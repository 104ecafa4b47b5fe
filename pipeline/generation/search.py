"""Beam search and sampling over an abstract step function, batched over images and beams.

Shapes: `B` images, `K` captions per image (beams or samples), `T` words, `P` regions, `V` vocabulary size.

Beam search keeps the `K` most likely captions of each image. A caption that has ended stays in the beam until more
likely ones replace it. Images whose result cannot change any more are removed from the batch. The captions of an image
do not depend on the other images of the batch, apart from rounding in the decoder's matrix products.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.captions.vocabulary import END, PAD, START, UNK
from pipeline.device import to_device
from pipeline.generation.caption import Caption
from pipeline.generation.step_rules import Continuations, beam_step, mask_forbidden, random_numbers, sample_step
from pipeline.params import params_section

S = TypeVar("S")

_STEPS_PER_CHECK = {"cpu": 1, "cuda": 4}
"""Decoding steps between two checks for finished images, by type of device. A check waits for a GPU."""
_COMPACT_AT = 0.8
"""Finished images are removed once at most this fraction of the batch is unfinished. Each removal copies the
unfinished ones."""


class StepFunction(Protocol[S]):
    """One decoding step of a decoder or an ensemble, with a state of any type for the images and their beams."""

    def step(self, tokens: Tensor, state: S) -> tuple[Tensor, S, Tensor]:
        """Decode one step.

        Args:
            tokens: Last token of each caption [B, K].
            state: State before the step.

        Returns:
            Logits [B, K, V], the state after the step, and attention weights [B, K, P].
        """

    def select_beams(self, state: S, beam_index: Tensor) -> S:
        """Return the state of the beams `beam_index` [B, K'] of each image."""

    def select_images(self, state: S, image_index: Tensor) -> S:
        """Return the state of the images `image_index` [B']."""


@params_section
class SearchParams:
    """How captions are decoded."""

    method: Literal["beam", "sample"]
    """Decoding method: beam search or sampling."""
    beam_size: Annotated[int, Field(ge=1, le=256)]
    """Number of beams; 1 is greedy search. Must be 1 for sampling."""
    num_groups: Annotated[int, Field(ge=1, le=256)]
    """Number of groups in diverse beam search; divides `beam_size`. 1 disables it."""
    diversity_penalty: Annotated[float, Field(ge=0, le=1000)]
    """Penalty, in nats, for each caption of an earlier group that chose the same word at this step."""
    guidance_scale: Annotated[float, Field(ge=1, le=100)]
    """Factor of the difference between the log-probabilities of words given the image and given a blank one; above 1
    captions are more specific, 1 disables it."""
    temperature: Annotated[float, Field(ge=0.01, le=100)]
    """Sampling temperature, by which logits are divided; above 1 captions vary more."""
    top_k: Annotated[int, Field(ge=0, le=1_000_000)]
    """Sample from the k most likely words; 0 disables it."""
    top_p: Annotated[float, Field(gt=0, le=1)]
    """Sample from the smallest set of words whose probabilities add up to this (nucleus sampling); 1 disables it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Sampling seed; the samples of an image depend on it and on the image's id."""
    min_length: Annotated[int, Field(ge=0, le=1000)]
    """Minimum caption length in words."""
    max_length: Annotated[int, Field(ge=1, le=1000)]
    """Maximum caption length in words."""
    length_normalization: Literal["none", "average", "gnmt"]
    """Divisor of the log-probability when captions are ranked: none, length^alpha (`average`), or
    ((5 + length) / 6)^alpha (`gnmt`). The length includes `<end>`."""
    length_alpha: Annotated[float, Field(ge=0, le=1)]
    """Exponent alpha of the length normalization: 0 favors short captions, 1 long ones. Must be 0 with `none`."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1000)]
    """Size of n-grams that may occur only once in a caption; 0 disables it."""
    allow_unk: bool
    """Allow `<unk>` in captions."""
    n_best: Annotated[int, Field(ge=1, le=1000)]
    """Captions returned for each image: the best of the beam, or the number of samples."""
    precision: Literal["float32", "bfloat16"]
    """Precision of the decoder's matrix products; bfloat16 (autocast) is faster and less exact."""

    def __post_init__(self) -> None:
        if self.min_length > self.max_length:
            raise ValueError(f"min_length must be at most max_length ({self.max_length}), got {self.min_length}")
        if self.length_normalization == "none" and self.length_alpha:
            raise ValueError(
                f"length_alpha must be 0 with length_normalization none, got {self.length_alpha}. Change one of them."
            )
        if self.method == "sample":
            self._require({"beam_size": 1, "num_groups": 1}, "with method sample (n_best is the number of samples)")
        else:
            self._require({"temperature": 1, "top_k": 0, "top_p": 1}, "with method beam")
            if self.beam_size % self.num_groups:
                raise ValueError(f"num_groups must divide beam_size ({self.beam_size}), got {self.num_groups}")
            if self.n_best > self.beam_size:
                raise ValueError(
                    f"n_best must be at most beam_size ({self.beam_size}), got {self.n_best}. Increase beam_size."
                )
        if self.num_groups == 1:
            self._require({"diversity_penalty": 0}, "with num_groups 1")

    def _require(self, neutral_values: dict[str, float], condition: str) -> None:
        for key, neutral in neutral_values.items():
            if getattr(self, key) != neutral:
                raise ValueError(f"{key} must be {neutral} {condition}, got {getattr(self, key)}")

    def length_divisor(self, length: Tensor) -> Tensor:
        """Return the divisor of the log-probability of captions with these lengths, which include `<end>`."""
        match self.length_normalization:
            case "none":
                return torch.ones_like(length)
            case "average":
                return length**self.length_alpha
            case "gnmt":
                return ((5 + length) / 6) ** self.length_alpha

    @classmethod
    def sampling(cls, num_samples: int, max_length: int, seed: int) -> "SearchParams":
        """Return the settings of sampling from the decoder's own distribution, with everything else turned off."""
        return replace(cls.greedy(max_length), method="sample", n_best=num_samples, seed=seed)

    @classmethod
    def greedy(cls, max_length: int) -> "SearchParams":
        """Return the settings of greedy search, with everything else turned off."""
        return cls(
            method="beam",
            beam_size=1,
            num_groups=1,
            diversity_penalty=0.0,
            guidance_scale=1.0,
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


def search(
    step_function: StepFunction[S],
    state: S,
    image_ids: Sequence[int],
    params: SearchParams,
    words: Sequence[str],
    device: torch.device,
) -> list[list[Caption]]:
    """Search for the captions of a batch of images.

    A caption ends with `<end>`, after `max_length` words, or when every next word is forbidden or has probability 0.
    Equal captions of several groups are returned once.

    Args:
        step_function: Decoder or ensemble.
        state: State before the first word, with one beam per image.
        image_ids: Ids of the B images, which seed sampling.
        params: Search settings.
        words: The vocabulary, indexed by token id.
        device: Device of the state.

    Returns:
        For each image, 1 to `params.n_best` captions: the best first, or samples in the order they were drawn. Their
        attention is [T, P].
    """
    is_sampling = params.method == "sample"
    num_beams = params.n_best if is_sampling else params.num_groups
    uniform = None
    if is_sampling:
        uniform = to_device(random_numbers(params.seed, image_ids, num_beams, params.max_length), device)
    beams = _Beams.start(len(image_ids), num_beams, device)
    state = step_function.select_beams(state, torch.zeros_like(beams.last_tokens))
    finished: list[_Beams] = []
    for t in range(params.max_length):
        logits, state, alpha = step_function.step(beams.last_tokens, state)
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)  # [B, K, V]
        mask_forbidden(log_probs, beams.tokens, params.no_repeat_ngram_size, _forbidden_tokens(params, t))
        if uniform is None:
            chosen = beam_step(
                log_probs,
                beams.total_log_probs,
                beams.ended,
                params.beam_size,
                params.num_groups,
                params.diversity_penalty,
            )
        else:
            step_uniform = uniform[beams.image_index, :, t]  # [B, K]
            chosen = sample_step(log_probs, beams.ended, step_uniform, params.temperature, params.top_k, params.top_p)
        beams.append(chosen, alpha)
        state = step_function.select_beams(state, chosen.beam_index)
        if (t + 1) % _STEPS_PER_CHECK.get(device.type, 1):
            continue
        is_finished = np.array(beams.is_finished(params).tolist())  # [B]
        if is_finished.all():
            break
        if (~is_finished).sum() <= _COMPACT_AT * len(is_finished):
            indices = [torch.from_numpy(mask.nonzero()[0]) for mask in (is_finished, ~is_finished)]
            ended, unfinished = (to_device(index, device) for index in indices)
            finished.append(beams.select_images(ended))
            beams, state = beams.select_images(unfinished), step_function.select_images(state, unfinished)
    captions: dict[int, list[Caption]] = {}  # by index in the batch
    for part in [*finished, beams]:
        captions |= part.make_captions(params, words)
    return [captions[index] for index in range(len(image_ids))]


def select_beams(values: Tensor, beam_index: Tensor) -> Tensor:
    """Select from values [B, K, ...] the beams `beam_index` [B, K'] of each image: [B, K', ...]."""
    index = beam_index.view(*beam_index.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


def _forbidden_tokens(params: SearchParams, step: int) -> list[int]:
    """Return the token ids that no caption may continue with at a step, counted from 0."""
    forbidden = [PAD, START]
    if not params.allow_unk:
        forbidden.append(UNK)
    if step < params.min_length:
        forbidden.append(END)
    return forbidden


@dataclass
class _Beams:
    """The captions of a batch so far."""

    image_index: Tensor
    """Index of each image in the batch that the search started with [B]."""
    tokens: Tensor
    """Token ids [B, K, 1 + T]: `<start>`, words, `<end>`, `<pad>`."""
    log_probs: Tensor
    """Log-probability of each token after `<start>` [B, K, T]."""
    total_log_probs: Tensor
    """Sum of `log_probs` over T [B, K]."""
    ended: Tensor
    """Whether a caption cannot continue [B, K]."""
    attention_steps: list[tuple[Tensor, Tensor]]
    """For each step, the attention weights [B, K', P] before the selection of beams, and the beam [B, K] that each
    caption continues."""

    @classmethod
    def start(cls, num_images: int, num_beams: int, device: torch.device) -> "_Beams":
        return cls(
            image_index=torch.arange(num_images, device=device),
            tokens=torch.full((num_images, num_beams, 1), START, device=device),
            log_probs=torch.zeros(num_images, num_beams, 0, device=device),
            total_log_probs=torch.zeros(num_images, num_beams, device=device),
            ended=torch.zeros(num_images, num_beams, dtype=torch.bool, device=device),
            attention_steps=[],
        )

    @property
    def last_tokens(self) -> Tensor:
        """Last token of each caption [B, K]."""
        return self.tokens[..., -1]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each caption [B, K]: its words and, if reached, `<end>`; at least 1."""
        return (self.tokens[..., 1:] != PAD).sum(dim=-1).clamp(min=1)

    def append(self, chosen: Continuations, alpha: Tensor) -> None:
        """Replace the captions by their chosen continuations."""
        beam_index, tokens, log_probs = chosen
        self.tokens = torch.cat([select_beams(self.tokens, beam_index), tokens.unsqueeze(-1)], dim=-1)
        self.log_probs = torch.cat([select_beams(self.log_probs, beam_index), log_probs.unsqueeze(-1)], dim=-1)
        self.total_log_probs = self.total_log_probs.gather(1, beam_index) + log_probs
        self.ended = self.ended.gather(1, beam_index) | (tokens == END) | (tokens == PAD)
        # Traced back at the end: reordering all attention weights here would copy them at every step.
        self.attention_steps.append((alpha, beam_index))

    def is_finished(self, params: SearchParams) -> Tensor:
        """Return whether the result of each image is final [B].

        It is final when all captions of the image have ended. Without groups, beam search is also finished when
        `n_best` ended captions score above an upper bound of the unfinished ones: a total log-probability only falls,
        and its divisor is largest at `max_length`. Those captions stay in the beam, since they are more likely than the
        unfinished ones.
        """
        all_ended = self.ended.all(dim=1)
        if params.method == "sample" or params.num_groups > 1 or params.n_best > self.total_log_probs.shape[1]:
            return all_ended
        scores = (self.total_log_probs / params.length_divisor(self.lengths)).masked_fill(~self.ended, -torch.inf)
        bounds = self.total_log_probs / params.length_divisor(torch.full_like(self.total_log_probs, params.max_length))
        upper_bound = bounds.masked_fill(self.ended, -torch.inf).amax(dim=1)
        return all_ended | (scores.topk(params.n_best, dim=1).values[:, -1] > upper_bound)

    def select_images(self, image_index: Tensor) -> "_Beams":
        """Return the captions of the images `image_index` [B']."""
        return _Beams(
            image_index=self.image_index[image_index],
            tokens=self.tokens[image_index],
            log_probs=self.log_probs[image_index],
            total_log_probs=self.total_log_probs[image_index],
            ended=self.ended[image_index],
            attention_steps=[(alpha[image_index], beams[image_index]) for alpha, beams in self.attention_steps],
        )

    def make_captions(self, params: SearchParams, words: Sequence[str]) -> dict[int, list[Caption]]:
        """Return the captions of each image, by its index in the batch that the search started with."""
        scores = (self.total_log_probs.double() / params.length_divisor(self.lengths.double())).tolist()
        tokens, log_probs = self.tokens[..., 1:].tolist(), self.log_probs.tolist()
        totals = self.total_log_probs.tolist()
        selected = [_select_captions(*image, params) for image in zip(tokens, scores, strict=True)]
        max_selected = max(map(len, selected))
        padded = [beams + [0] * (max_selected - len(beams)) for beams in selected]
        beam_index = to_device(torch.tensor(padded), self.image_index.device)
        attention = self._trace_attention(beam_index)  # [B, max_selected, T, P]
        results: dict[int, list[Caption]] = {}
        for row, index in enumerate(self.image_index.tolist()):
            results[index] = []
            for rank, beam in enumerate(selected[row]):
                token_ids = _strip(tokens[row][beam])
                caption = Caption(
                    words=tuple(words[token] for token in token_ids),
                    log_probability=totals[row][beam],
                    score=scores[row][beam],
                    word_log_probabilities=tuple(log_probs[row][beam][: len(token_ids)]),
                    attention=attention[row, rank, : len(token_ids)].numpy(),
                )
                results[index].append(caption)
        return results

    def _trace_attention(self, beam_index: Tensor) -> Tensor:
        """Trace back the attention weights [B, N, T, P] of the captions `beam_index` [B, N] from the last step."""
        steps = []
        for alpha, parents in reversed(self.attention_steps):
            beam_index = parents.gather(1, beam_index)
            steps.append(select_beams(alpha, beam_index))
        return torch.stack(steps[::-1], dim=2).float().cpu()


def _select_captions(captions: list[list[int]], scores: list[float], params: SearchParams) -> list[int]:
    """Select the beams of one image to return: distinct captions by descending score, or all samples.

    Args:
        captions: Token ids of each beam.
        scores: Score of each beam; minus infinity for a beam without caption.
        params: Search settings.
    """
    if params.method == "sample":
        return list(range(len(captions)))
    ranking = sorted((beam for beam, score in enumerate(scores) if score > -torch.inf), key=lambda beam: -scores[beam])
    distinct = {_strip(captions[beam]): beam for beam in reversed(ranking)}
    return sorted(distinct.values(), key=ranking.index)[: params.n_best]


def _strip(tokens: list[int]) -> tuple[int, ...]:
    """Remove `<end>` and `<pad>`."""
    return tuple(token for token in tokens if token not in (END, PAD))
