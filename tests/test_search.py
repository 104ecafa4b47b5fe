"""Search: tables worked by hand, all possible captions, and the reference implementation in `search_reference.py`."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.captions.vocabulary import END, SPECIALS, START, UNK
from pipeline.decoder.decoder import Decoder, DecoderKind
from pipeline.decoder.references import REFERENCES
from pipeline.decoder.registry import build_decoder
from pipeline.errors import UserError
from pipeline.generation import search as search_module
from pipeline.generation.caption import Caption
from pipeline.generation.ensemble import caption_grids, precompute
from pipeline.generation.search import SearchParams, search, select_beams
from pipeline.params import check
from tests.defaults import default_section
from tests.factories import decoder_params
from tests.kinds import KINDS, all_kinds
from tests.search_reference import Hypothesis, reference_search, score

A, B, C = 4, 5, 6
WORDS = (*SPECIALS, "a", "b", "c")
MORE_WORDS = (*SPECIALS, *"abcde")
CPU = torch.device("cpu")

Table = dict[int, dict[int, float]]
"""Probabilities of the next token by the last one; a token that is not listed is followed by `<end>`."""
RandomState = tuple[Tensor, Tensor]
"""Image indices [B] and hidden states [B, K, H]."""

TWO_IMAGES: list[Table] = [
    # Greedy search takes a (0.5), which only continues with 0.4. The best caption begins with b: 0.4 * 0.9 * 1.
    {START: {A: 0.5, B: 0.4, C: 0.1}, A: {B: 0.4, C: 0.3, END: 0.3}, B: {C: 0.9, END: 0.1}, C: {END: 1.0}},
    # The second image ends at once and must not change while the first continues.
    {START: {END: 0.6, A: 0.4}, A: {END: 1.0}, B: {END: 1.0}, C: {END: 1.0}},
]


class TableSteps:
    """A step function that reads probabilities from one table per image.

    Its state is the image index [B, K]. All attention is on the region whose index is the last token.
    """

    def __init__(self, tables: list[Table]) -> None:
        self.tables = tables

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.full((*tokens.shape, len(WORDS)), -torch.inf)
        for image, row in enumerate(tokens.tolist()):
            for beam, token in enumerate(row):
                table = self.tables[int(state[image, beam])]
                for next_token, probability in table.get(token, {END: 1.0}).items():
                    logits[image, beam, next_token] = math.log(probability)
        return logits, state, torch.nn.functional.one_hot(tokens, len(WORDS)).float()

    def select_beams(self, state: Tensor, beam_index: Tensor) -> Tensor:
        return state.gather(1, beam_index)

    def select_images(self, state: Tensor, image_index: Tensor) -> Tensor:
        return state[image_index]


def table_search(tables: list[Table], params: SearchParams) -> list[list[Caption]]:
    state = torch.arange(len(tables)).unsqueeze(1)
    return search(TableSteps(tables), state, range(len(tables)), params, WORDS, CPU)


def beam_params(beam_size: int, max_length: int = 9, average: bool = False, allow_unk: bool = False) -> SearchParams:
    return replace(
        SearchParams.greedy(max_length),
        beam_size=beam_size,
        n_best=beam_size,
        length_normalization="average" if average else "none",
        length_alpha=1.0 if average else 0.0,
        allow_unk=allow_unk,
    )


def test_greedy_search_takes_the_most_likely_word_at_each_step() -> None:
    first, second = table_search(TWO_IMAGES, beam_params(beam_size=1))
    assert first[0].text == "a b c"
    assert math.exp(first[0].log_probability) == pytest.approx(0.5 * 0.4 * 0.9)
    assert second[0].text == ""
    assert math.exp(second[0].log_probability) == pytest.approx(0.6)


def test_beam_search_finds_a_better_caption_than_greedy_search() -> None:
    first, second = table_search(TWO_IMAGES, beam_params(beam_size=2))
    assert first[0].text == "b c"
    assert math.exp(first[0].score) == pytest.approx(0.4 * 0.9)
    assert [caption.text for caption in second] == ["", "a"]


def test_word_log_probabilities_are_those_of_the_words_without_the_end() -> None:
    best = table_search(TWO_IMAGES, beam_params(beam_size=3))[1][1]
    assert best.text == "a"
    assert best.word_probabilities == pytest.approx([0.4])


def test_length_normalization_favors_longer_captions() -> None:
    ranked = table_search(TWO_IMAGES, beam_params(beam_size=3, average=True))[1]
    assert [caption.text for caption in ranked] == ["a", ""]
    assert ranked[0].score == pytest.approx(math.log(0.4) / 2)


def test_attention_belongs_to_the_words_of_the_caption() -> None:
    best = table_search(TWO_IMAGES, beam_params(beam_size=2))[0][0]
    assert best.text == "b c"
    assert best.attention is not None
    assert best.attention.argmax(axis=-1).tolist() == [START, B]


def test_a_caption_without_end_is_truncated_at_the_maximum_length() -> None:
    endless: list[Table] = [{START: {A: 1.0}, A: {B: 0.5, A: 0.5}, B: {A: 1.0}}]
    best = table_search(endless, beam_params(beam_size=2, max_length=4))[0][0]
    assert len(best.words) == 4
    assert best.attention is not None
    assert best.attention.shape == (4, len(WORDS))


@pytest.mark.parametrize(("allow_unk", "text"), [(True, "<unk>"), (False, "a")])
def test_unk_is_generated_only_if_allowed(allow_unk: bool, text: str) -> None:
    table: list[Table] = [{START: {UNK: 0.9, A: 0.1}}]
    assert table_search(table, beam_params(beam_size=1, allow_unk=allow_unk))[0][0].text == text


@pytest.mark.parametrize("seed", range(20))
def test_a_beam_that_holds_all_captions_finds_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = (END, A, B, C)
    rows = torch.rand(5, 4, generator=generator).softmax(-1).tolist()
    table = {token: dict(zip(tokens, row, strict=True)) for token, row in zip((START, A, B, C), rows, strict=False)}

    def probability(sequence: tuple[int, ...]) -> float:
        return math.prod(table[a][b] for a, b in itertools.pairwise((START, *sequence)))

    ended = [(*body, END) for length in range(4) for body in itertools.product((A, B, C), repeat=length)]
    cut = list(itertools.product((A, B, C), repeat=4))
    probabilities = {sequence: probability(sequence) for sequence in [*ended, *cut]}
    best = max(probabilities, key=probabilities.__getitem__)
    captions = table_search([table], beam_params(beam_size=200, max_length=4))[0]
    assert captions[0].words == tuple(WORDS[token] for token in best if token != END)
    assert math.exp(captions[0].log_probability) == pytest.approx(probabilities[best], rel=1e-5)
    assert len(captions) == len(probabilities)


class RandomSteps:
    """A small random recurrent network for each image, in which some pairs of tokens never occur."""

    def __init__(self, num_images: int, vocab_size: int, generator: torch.Generator) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(num_images, *shape, generator=generator, dtype=torch.float64)

        self.embedding, self.recurrent, self.output, self.attention = (
            normal(vocab_size, 6),
            normal(6, 6),
            normal(6, vocab_size),
            normal(6, 3),
        )
        # [image, last token, next token]
        self.impossible = torch.rand(num_images, vocab_size, vocab_size, generator=generator) < 0.1
        self.start = torch.arange(num_images), normal(1, 6)

    def step(self, tokens: Tensor, state: RandomState) -> tuple[Tensor, RandomState, Tensor]:
        images, hidden = state
        hidden = torch.tanh(hidden @ self.recurrent[images] + self.embedding[images.unsqueeze(1), tokens])
        logits = (2 * hidden @ self.output[images]).masked_fill(
            self.impossible[images.unsqueeze(1), tokens], -torch.inf
        )
        return logits, (images, hidden), (hidden @ self.attention[images]).softmax(dim=-1)

    def select_beams(self, state: RandomState, beam_index: Tensor) -> RandomState:
        return state[0], select_beams(state[1], beam_index)

    def select_images(self, state: RandomState, image_index: Tensor) -> RandomState:
        return state[0][image_index], state[1][image_index]

    def step_one(self, token: int, state: RandomState) -> tuple[list[float], RandomState, list[float]]:
        """Decode one step of one caption of one image, as the reference search does."""
        logits, state, attention = self.step(torch.tensor([[token]]), state)
        return logits.log_softmax(dim=-1).flatten().tolist(), state, attention.flatten().tolist()


def make_decoder(hidden_size: int = 8, kind: DecoderKind = "soft_attention") -> Decoder:
    """Make a decoder of grids of 2 x 3 regions with 5 channels, with large weights for confident predictions."""
    sizes = decoder_params(kind=kind, embedding_size=7, hidden_size=hidden_size, attention_size=6, dropout=0.3)
    decoder = build_decoder(sizes, (2, 3), 5, len(MORE_WORDS)).double().eval()
    for weights in decoder.parameters():
        weights.data *= 3
    return decoder


def random_params(rng: random.Random) -> SearchParams:
    beam_size = rng.randint(1, 6)
    num_groups = rng.choice([count for count in range(1, beam_size + 1) if beam_size % count == 0])
    min_length = rng.choice([0, 0, 1, 3])
    normalization = rng.choice(["none", "average", "gnmt"])
    params = replace(
        SearchParams.greedy(rng.randint(max(1, min_length), 8)),
        min_length=min_length,
        length_normalization=normalization,
        length_alpha=0.0 if normalization == "none" else rng.random(),
        no_repeat_ngram_size=rng.choice([0, 0, 1, 2, 3]),
        allow_unk=rng.random() < 0.5,
    )
    if rng.random() < 0.3:
        return replace(
            params,
            method="sample",
            temperature=rng.uniform(0.5, 2),
            top_k=rng.choice([0, 1, 3]),
            top_p=rng.choice([1.0, rng.uniform(0.1, 1)]),
            seed=rng.randrange(1000),
            n_best=rng.randint(1, 3),
        )
    diversity_penalty = rng.choice([0.0, 0.5, 2.0]) if num_groups > 1 else 0.0
    return replace(
        params,
        beam_size=beam_size,
        num_groups=num_groups,
        diversity_penalty=diversity_penalty,
        n_best=rng.randint(1, beam_size),
    )


def assert_same(
    captions: Sequence[Caption], expected: Sequence[Hypothesis], words: Sequence[str], params: SearchParams
) -> None:
    expected_words = [tuple(words[token] for token in hypothesis.tokens) for hypothesis in expected]
    assert [caption.words for caption in captions] == expected_words, params
    for caption, hypothesis in zip(captions, expected, strict=True):
        assert caption.log_probability == pytest.approx(hypothesis.log_probability, rel=1e-9), params
        assert caption.score == pytest.approx(score(hypothesis, params), rel=1e-9), params
        assert caption.attention is not None
        expected_attention = np.ravel(hypothesis.attention)
        assert caption.attention.flatten().tolist() == pytest.approx(expected_attention, abs=1e-6), params


@pytest.mark.slow
@pytest.mark.parametrize("steps_per_check", [1, 4])
def test_random_networks_give_the_same_captions_as_the_reference_search(
    steps_per_check: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "_STEPS_PER_CHECK", {"cpu": steps_per_check})
    outcomes: Counter[str] = Counter()
    for seed in range(250):
        generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        params = random_params(rng)
        vocab_size = rng.randint(4, 12)
        words = tuple(f"word{token}" for token in range(vocab_size))
        steps = RandomSteps(num_images=4, vocab_size=vocab_size, generator=generator)
        image_ids = [rng.randrange(10**12) for _ in range(4)]
        results = search(steps, steps.start, image_ids, params, words, CPU)
        for image, (image_id, captions) in enumerate(zip(image_ids, results, strict=True)):
            start = steps.start[0][[image]], steps.start[1][[image]]
            expected = reference_search(steps.step_one, start, image_id, params)
            assert_same(captions, expected, words, params)
            outcomes["stuck"] += sum(hypothesis.stuck for hypothesis in expected)
            outcomes["cut"] += sum(not hypothesis.finished for hypothesis in expected)
            outcomes["ended"] += sum(hypothesis.reached_end for hypothesis in expected)
    assert min(outcomes.values()) > 30


@pytest.mark.slow
@all_kinds
def test_decoders_give_the_same_captions_as_the_reference_search(kind: DecoderKind) -> None:
    torch.manual_seed(3)
    decoder, grids = make_decoder(kind=kind), torch.randn(6, 6, 5, dtype=torch.float64)
    reference = REFERENCES[kind](decoder).eval()

    def step_one(token: int, state: tuple[Tensor, tuple[Tensor, ...]]) -> tuple[list[float], object, list[float]]:
        regions, decoder_state = state
        logits, decoder_state, alpha = reference.decode_step(torch.tensor([token]), decoder_state, regions)
        return logits.log_softmax(dim=-1).flatten().tolist(), (regions, decoder_state), alpha.flatten().tolist()

    for seed in range(12):
        params = random_params(random.Random(seed))
        with torch.no_grad():
            states = []
            for regions in reference.prepare(grids).split(1):
                states.append((regions, reference.init_state(regions)))
            expected = [reference_search(step_one, state, image_id, params) for image_id, state in enumerate(states)]
        results = caption_grids([decoder], MORE_WORDS, grids, range(6), params)
        for captions, hypotheses in zip(results, expected, strict=True):
            assert_same(captions, hypotheses, MORE_WORDS, params)


@all_kinds
@pytest.mark.parametrize("method", ["beam", "sample"])
def test_captions_do_not_depend_on_the_batch(method: str, kind: DecoderKind) -> None:
    torch.manual_seed(9)
    decoder, grids = make_decoder(kind=kind).float(), torch.randn(20, 6, 5)
    image_ids = [7 * index for index in range(20)]
    params = replace(SearchParams.greedy(max_length=12), min_length=1)
    params = replace(params, beam_size=4, n_best=4) if method == "beam" else replace(params, method="sample", n_best=2)
    together = caption_grids([decoder], MORE_WORDS, grids, image_ids, params)
    reversed_order = caption_grids([decoder], MORE_WORDS, grids.flip(0), image_ids[::-1], params)[::-1]
    in_pairs = [
        captions
        for start in range(0, 20, 2)
        for captions in caption_grids(
            [decoder], MORE_WORDS, grids[start : start + 2], image_ids[start : start + 2], params
        )
    ]
    assert len({len(captions[0].words) for captions in together}) > 1
    for results in (reversed_order, in_pairs):
        for captions, expected in zip(results, together, strict=True):
            assert [caption.words for caption in captions] == [caption.words for caption in expected]
            scores = [caption.score for caption in expected]
            assert [caption.score for caption in captions] == pytest.approx(scores, abs=1e-4)


def test_precomputed_word_projections_do_not_change_captions() -> None:
    torch.manual_seed(5)
    decoder, grids = make_decoder(), torch.randn(5, 6, 5, dtype=torch.float64)
    params = replace(SearchParams.greedy(max_length=9), beam_size=3)
    expected = caption_grids([decoder], MORE_WORDS, grids, range(5), params)
    results = caption_grids([decoder], MORE_WORDS, grids, range(5), params, precompute([decoder], params))
    for (result,), (expected_caption,) in zip(results, expected, strict=True):
        assert result.words == expected_caption.words
        assert result.score == pytest.approx(expected_caption.score, rel=1e-9)


def test_an_ensemble_of_all_kinds_averages_probabilities_and_attention() -> None:
    torch.manual_seed(6)
    decoders = [make_decoder(hidden_size, kind) for hidden_size, kind in zip((8, 5, 3), KINDS, strict=True)]
    grids = torch.randn(4, 6, 5, dtype=torch.float64)
    params = replace(SearchParams.greedy(max_length=6), beam_size=3, n_best=3)
    for grid, captions in zip(grids, caption_grids(decoders, MORE_WORDS, grids, range(4), params), strict=True):
        for result in captions:
            length = len(result.words)
            tokens = torch.tensor([[[START, *map(MORE_WORDS.index, result.words), END]]])  # [1, 1, T + 2]
            with torch.no_grad():
                outputs = [decoder(grid.unsqueeze(0), tokens[:, :, :-1]) for decoder in decoders]
            probabilities = torch.stack([logits.softmax(dim=-1) for logits, _ in outputs]).mean(dim=0)
            log_probs = probabilities.log().gather(-1, tokens[:, :, 1:].unsqueeze(-1)).flatten()
            assert result.log_probability == pytest.approx(float(log_probs[: min(length + 1, 6)].sum()), rel=1e-6)
            alpha = torch.stack([alpha for _, alpha in outputs]).mean(dim=0)[0, 0, :length]  # [T, P]
            np.testing.assert_allclose(result.attention, alpha, rtol=1e-5)


@pytest.mark.parametrize("method", ["beam", "sample"])
def test_guided_captions_of_an_ensemble_are_those_of_the_reference_search(method: str) -> None:
    torch.manual_seed(8)
    decoders = [make_decoder(hidden_size, kind) for hidden_size, kind in zip((8, 5, 3), KINDS, strict=True)]
    references = [REFERENCES[kind](decoder).eval() for kind, decoder in zip(KINDS, decoders, strict=True)]
    grids = torch.randn(6, 6, 5, dtype=torch.float64)
    scale = 1.7

    def step_one(token: int, state: list[Any]) -> tuple[list[float], list[Any], list[float]]:
        outputs = [
            [reference.decode_step(torch.tensor([token]), decoder_state, regions) for regions, decoder_state in states]
            for reference, states in zip(references, state, strict=True)
        ]  # for each decoder: given the image, given a blank one
        given, blank = (
            torch.stack([member[index][0].softmax(dim=-1) for member in outputs]).mean(dim=0).log() for index in (0, 1)
        )
        next_state = [
            [(regions, decoder_state) for (regions, _), (_, decoder_state, _) in zip(states, member, strict=True)]
            for states, member in zip(state, outputs, strict=True)
        ]
        alpha = torch.stack([member[0][2] for member in outputs]).mean(dim=0)
        log_probs = (scale * given + (1 - scale) * blank).log_softmax(dim=-1)
        return log_probs.flatten().tolist(), next_state, alpha.flatten().tolist()

    params = replace(SearchParams.greedy(max_length=7), guidance_scale=scale)
    params = replace(params, beam_size=4, n_best=4) if method == "beam" else replace(params, method="sample", n_best=2)
    results = caption_grids(decoders, MORE_WORDS, grids, range(6), params)
    for image, captions in enumerate(results):
        with torch.no_grad():
            state = []
            for reference in references:
                inputs = [reference.prepare(values) for values in (grids[[image]], torch.zeros_like(grids[[image]]))]
                state.append([(regions, reference.init_state(regions)) for regions in inputs])
            assert_same(captions, reference_search(step_one, state, image, params), MORE_WORDS, params)
    unguided = caption_grids(decoders, MORE_WORDS, grids, range(6), replace(params, guidance_scale=1.0))
    assert [captions[0].words for captions in results] != [captions[0].words for captions in unguided]


def test_an_ensemble_of_equal_decoders_equals_one_decoder() -> None:
    torch.manual_seed(7)
    decoder, grids = make_decoder(), torch.randn(4, 6, 5, dtype=torch.float64)
    params = replace(SearchParams.greedy(max_length=6), beam_size=2)
    single = caption_grids([decoder], MORE_WORDS, grids, range(4), params)
    double = caption_grids([decoder, decoder], MORE_WORDS, grids, range(4), params)
    for (expected,), (result,) in zip(single, double, strict=True):
        assert result.words == expected.words
        assert result.score == pytest.approx(expected.score, rel=1e-6)


def test_an_image_without_possible_words_has_an_empty_caption() -> None:
    tables: list[Table] = [{START: {UNK: 1.0}}, {START: {A: 1.0}, A: {A: 1.0}}]
    first, second = table_search(tables, replace(beam_params(beam_size=2), no_repeat_ngram_size=1, min_length=2))
    assert [(caption.text, caption.log_probability, caption.score) for caption in first] == [("", 0.0, 0.0)]
    assert [caption.text for caption in second] == ["a"]


def test_diverse_groups_begin_with_different_words() -> None:
    table: list[Table] = [{START: {A: 0.5, B: 0.3, C: 0.2}}]
    diverse = table_search(table, replace(beam_params(beam_size=3), num_groups=3, diversity_penalty=9.0))[0]
    assert [caption.text for caption in diverse] == ["a", "b", "c"]
    assert [math.exp(caption.score) for caption in diverse] == pytest.approx([0.5, 0.3, 0.2])
    equal = table_search(table, replace(beam_params(beam_size=3), num_groups=3, diversity_penalty=0.0))[0]
    assert [caption.text for caption in equal] == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"a": 0.5, "b": 0.3, "c": 0.2}),
        ({"temperature": 0.5}, {"a": 0.25 / 0.38, "b": 0.09 / 0.38, "c": 0.04 / 0.38}),
        ({"top_k": 2}, {"a": 0.625, "b": 0.375}),
        ({"top_p": 0.7}, {"a": 0.625, "b": 0.375}),
        ({"top_p": 0.4}, {"a": 1.0}),
        ({"top_k": 1}, {"a": 1.0}),
    ],
)
def test_words_are_sampled_with_their_probabilities(changes: dict[str, float], expected: dict[str, float]) -> None:
    tables: list[Table] = [{START: {A: 0.5, B: 0.3, C: 0.2}}] * 1500
    params = replace(SearchParams.greedy(max_length=2), method="sample", **changes)  # type: ignore[arg-type]
    counts = Counter(caption.words[0] for (caption,) in table_search(tables, params))
    assert {word: count / 1500 for word, count in counts.items()} == pytest.approx(expected, abs=0.04)


def test_samples_depend_on_seed_and_image_and_not_on_their_number() -> None:
    tables: list[Table] = [{START: {A: 0.5, B: 0.5}, A: {A: 0.5, B: 0.5}, B: {A: 0.5, B: 0.5}}] * 30
    params = replace(SearchParams.greedy(max_length=8), method="sample", n_best=2)
    results = table_search(tables, params)
    assert results != table_search(tables, replace(params, seed=1))
    assert len({caption.words for captions in results for caption in captions}) > 40
    more = table_search(tables, replace(params, n_best=5))
    assert [captions[:2] for captions in more] == results


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"min_length": 31}, ["min_length must be at most max_length (30), got 31"]),
        ({"num_groups": 2}, ["num_groups must divide beam_size (5), got 2"]),
        ({"n_best": 6}, ["n_best must be at most beam_size (5), got 6"]),
        ({"diversity_penalty": 0.5}, ["diversity_penalty must be 0", "num_groups 1", "got 0.5"]),
        ({"top_p": 0.9}, ["top_p must be 1", "method beam", "got 0.9"]),
        ({"method": "sample"}, ["beam_size must be 1", "method sample", "got 5"]),
        ({"length_alpha": 0.5}, ["length_alpha must be 0", "length_normalization none", "got 0.5"]),
    ],
)
def test_contradictory_settings_are_errors(changes: dict[str, object], facts: list[str]) -> None:
    values = default_section("generate")["search"]
    with pytest.raises(UserError) as error:
        check(values | changes, "generate.search", SearchParams, "params.yaml")
    for fact in ["params.yaml: generate.search", *facts]:
        assert fact in str(error.value)
