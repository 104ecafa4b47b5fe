"""The batched search against tables worked by hand and against every possible sentence."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.captions.vocabulary import END, START, UNK
from pipeline.decoder.soft_attention import DecoderParams, SoftAttentionDecoder
from pipeline.errors import UserError
from pipeline.generation.ensemble import caption, precompute
from pipeline.generation.search import Hypothesis, SearchParams, pick_beams, search
from pipeline.params import check, read_yaml
from tests import textbook
from tests.textbook_search import Caption, score, textbook_search

A, B, C = 4, 5, 6
VOCABULARY = 7

Table = dict[int, dict[int, float]]
RandomState = tuple[Tensor, Tensor]
"""The images' numbers [B], and the hidden states [B, W, H]."""

# What follows what, for two images: log-probabilities are the logarithms of these numbers.
WORKED = [
    # Greedy takes A (0.5) and can only go on with 0.4; the best sentence begins with B: 0.4 * 0.9 * 1.
    {1: {A: 0.5, B: 0.4, C: 0.1}, A: {B: 0.4, C: 0.3, END: 0.3}, B: {C: 0.9, END: 0.1}, C: {END: 1.0}},
    # The second image ends at once, and must wait for the first without changing.
    {1: {END: 0.6, A: 0.4}, A: {END: 1.0}, B: {END: 1.0}, C: {END: 1.0}},
]


class Tables:
    """A stepper whose state is the image's number, and whose attention points at the last word's region."""

    def __init__(self, tables: list[Table]) -> None:
        self.tables = tables

    def step(self, words: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.full((*words.shape, VOCABULARY), -torch.inf)
        for image, row in enumerate(words.tolist()):
            for beam, word in enumerate(row):
                for follower, probability in self.tables[int(state[image, beam])].get(word, {END: 1.0}).items():
                    logits[image, beam, follower] = math.log(probability)
        return logits, state, torch.nn.functional.one_hot(words, VOCABULARY).float()

    def select_beams(self, state: Tensor, beams: Tensor) -> Tensor:
        return state.gather(1, beams)

    def select_images(self, state: Tensor, images: Tensor) -> Tensor:
        return state[images]


def table_search(tables: list[Table], params: SearchParams) -> list[list[Hypothesis]]:
    start = torch.arange(len(tables)).unsqueeze(1)
    return search(Tables(tables), start, range(len(tables)), params, torch.device("cpu"))


def settings(beam: int, max_length: int = 9, average: bool = False, unknown: bool = False) -> SearchParams:
    return replace(
        SearchParams.greedy(max_length),
        beam_size=beam,
        n_best=beam,
        length_normalization="average" if average else "none",
        length_alpha=1.0 if average else 0.0,
        allow_unk=unknown,
    )


def test_greedy_search_takes_the_likeliest_word_each_time() -> None:
    first, second = table_search(WORKED, settings(beam_size=1))
    assert first[0].words == (A, B, C)
    assert math.exp(first[0].log_probability) == pytest.approx(0.5 * 0.4 * 0.9)
    assert second[0].words == ()
    assert math.exp(second[0].log_probability) == pytest.approx(0.6)


def test_a_beam_finds_the_better_sentence_that_greedy_search_misses() -> None:
    first, second = table_search(WORKED, settings(beam_size=2))
    assert first[0].words == (B, C)
    assert math.exp(first[0].score) == pytest.approx(0.4 * 0.9)
    assert [beam.words for beam in second] == [(), (A,)]


def test_the_average_ranks_longer_sentences_higher() -> None:
    ranked = table_search(WORKED, settings(beam_size=3, average=True))[1]
    assert [beam.words for beam in ranked] == [(A,), ()]
    assert ranked[0].score == pytest.approx(math.log(0.4) / 2)


def test_attention_follows_the_beam_it_belongs_to() -> None:
    best = table_search(WORKED, settings(beam_size=2))[0][0]
    assert best.words == (B, C)
    assert best.attention.argmax(dim=-1).tolist() == [1, B]


def test_a_caption_that_never_ends_is_returned_as_it_stands() -> None:
    endless = [{1: {A: 1.0}, A: {B: 0.5, A: 0.5}, B: {A: 1.0}}]
    best = table_search(endless, settings(beam_size=2, max_length=4))[0][0]
    assert len(best.words) == 4
    assert END not in best.words
    assert best.attention.shape == (4, VOCABULARY)


@pytest.mark.parametrize(("allowed", "words"), [(True, (UNK,)), (False, (A,))])
def test_unknown_words_stand_in_captions_only_where_allowed(allowed: bool, words: tuple[int, ...]) -> None:
    rare = [{1: {UNK: 0.9, A: 0.1}}]
    assert table_search(rare, settings(beam_size=1, unknown=allowed))[0][0].words == words


@pytest.mark.parametrize("seed", range(20))
def test_a_beam_as_wide_as_all_sentences_finds_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = (END, A, B, C)
    draws = torch.rand(5, 4, generator=generator).softmax(-1).tolist()
    table = {word: dict(zip(words, row, strict=True)) for word, row in zip((1, A, B, C), draws, strict=False)}

    def probability(sentence: tuple[int, ...]) -> float:
        return math.prod(table[a][b] for a, b in itertools.pairwise((1, *sentence)))

    sentences = [(*body, END) for length in range(4) for body in itertools.product((A, B, C), repeat=length)]
    cut = list(itertools.product((A, B, C), repeat=4))
    everything = {sentence: probability(sentence) for sentence in [*sentences, *cut]}
    best = max(everything, key=everything.__getitem__)
    found = table_search([table], settings(beam_size=200, max_length=4))[0]
    assert found[0].words == tuple(word for word in best if word != END)
    assert math.exp(found[0].log_probability) == pytest.approx(everything[best], rel=1e-5)
    assert len(found) == len(everything)


class RandomModels:
    """A small random recurrent network for each image, some of whose words never follow some others."""

    def __init__(self, images: int, words: int, generator: torch.Generator) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(images, *shape, generator=generator, dtype=torch.float64)

        self.embedding, self.recurrent, self.output, self.look = (
            normal(words, 6),
            normal(6, 6),
            normal(6, words),
            normal(6, 3),
        )
        self.strange = torch.rand(images, words, words, generator=generator) < 0.1  # [image, last word, next word]
        self.start = torch.arange(images), normal(1, 6)

    def step(self, words: Tensor, state: RandomState) -> tuple[Tensor, RandomState, Tensor]:
        images, hidden = state
        hidden = torch.tanh(hidden @ self.recurrent[images] + self.embedding[images.unsqueeze(1), words])
        logits = (2 * hidden @ self.output[images]).masked_fill(self.strange[images.unsqueeze(1), words], -torch.inf)
        return logits, (images, hidden), (hidden @ self.look[images]).softmax(dim=-1)

    def select_beams(self, state: RandomState, beams: Tensor) -> RandomState:
        return state[0], pick_beams(state[1], beams)

    def select_images(self, state: RandomState, images: Tensor) -> RandomState:
        return state[0][images], state[1][images]

    def alone(self, word: int, state: RandomState) -> tuple[list[float], RandomState, list[float]]:
        """One step of one caption of one image."""
        logits, state, attention = self.step(torch.tensor([[word]]), state)
        return logits.log_softmax(dim=-1).flatten().tolist(), state, attention.flatten().tolist()


def real_decoder(state: int = 8) -> SoftAttentionDecoder:
    """For 2 x 3 regions of 5 channels and 9 words, with weights large enough to have opinions."""
    sizes = DecoderParams(
        embedding_size=7, hidden_size=state, attention_size=6, dropout=0.3, region_dropout=0.0, word_dropout=0.0
    )
    decoder = SoftAttentionDecoder(sizes, (2, 3), 5, 9).double().eval()
    for weights in decoder.parameters():
        weights.data *= 3
    return decoder


def random_settings(rng: random.Random) -> SearchParams:
    beam = rng.randint(1, 6)
    groups = rng.choice([number for number in range(1, beam + 1) if beam % number == 0])
    min_length = rng.choice([0, 0, 1, 3])
    penalty = rng.choice(["none", "average", "gnmt"])
    params = replace(
        SearchParams.greedy(rng.randint(max(1, min_length), 8)),
        min_length=min_length,
        length_normalization=penalty,
        length_alpha=0.0 if penalty == "none" else rng.random(),
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
    diversity = rng.choice([0.0, 0.5, 2.0]) if groups > 1 else 0.0
    return replace(params, beam_size=beam, num_groups=groups, diversity_penalty=diversity, n_best=rng.randint(1, beam))


def assert_same(ours: Sequence[Hypothesis], wanted: Sequence[Caption], params: SearchParams) -> None:
    assert [one.words for one in ours] == [one.words for one in wanted], params
    for mine, its in zip(ours, wanted, strict=True):
        assert mine.log_probability == pytest.approx(its.log_probability, rel=1e-9), params
        assert mine.score == pytest.approx(score(its, params), rel=1e-9), params
        assert mine.attention.flatten().tolist() == pytest.approx(np.ravel(its.attention), abs=1e-6), params


def test_a_thousand_random_models_are_searched_as_by_the_textbook() -> None:
    met: Counter[str] = Counter()
    for seed in range(250):
        generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        params = random_settings(rng)
        models = RandomModels(images=4, words=rng.randint(4, 12), generator=generator)
        image_ids = [rng.randrange(10**12) for _ in range(4)]
        found = search(models, models.start, image_ids, params, torch.device("cpu"))
        for image, (image_id, ours) in enumerate(zip(image_ids, found, strict=True)):
            start = models.start[0][[image]], models.start[1][[image]]
            wanted = textbook_search(models.alone, start, image_id, params)
            assert_same(ours, wanted, params)
            met["stuck"] += sum(one.stuck for one in wanted)
            met["cut off"] += sum(not one.over for one in wanted)
            met["ended"] += sum(one.reached_end for one in wanted)
    assert min(met.values()) > 30


def test_real_decoders_are_searched_as_by_the_textbook() -> None:
    torch.manual_seed(3)
    decoder, grids = real_decoder(), torch.randn(6, 6, 5, dtype=torch.float64)

    def alone(word: int, state: tuple[Tensor, textbook.State]) -> tuple[list[float], object, list[float]]:
        regions, remembered = state
        logits, remembered, attention = its.step(torch.tensor([word]), remembered, regions)
        return logits.log_softmax(dim=-1).flatten().tolist(), (regions, remembered), attention.flatten().tolist()

    its = textbook.SoftAttentionReference(decoder).eval()
    for seed in range(12):
        params = random_settings(random.Random(seed))
        with torch.no_grad():
            regions = its.look(grids)
            states = [(own.unsqueeze(0), its.start(own.unsqueeze(0))) for own in regions]
            wanted = [textbook_search(alone, state, image_id, params) for image_id, state in enumerate(states)]
        for ours, theirs in zip(caption([decoder], grids, range(6), params), wanted, strict=True):
            assert_same(ours, theirs, params)


@pytest.mark.parametrize("method", ["beam", "sample"])
def test_a_caption_depends_neither_on_the_batch_nor_on_the_neighbors(method: str) -> None:
    torch.manual_seed(4)
    decoder, grids, image_ids = real_decoder().float(), torch.randn(20, 6, 5), [7 * number for number in range(20)]
    params = replace(SearchParams.greedy(max_length=12), min_length=1)
    params = replace(params, beam_size=4, n_best=4) if method == "beam" else replace(params, method="sample", n_best=2)
    together = caption([decoder], grids, image_ids, params)
    backwards = caption([decoder], grids.flip(0), image_ids[::-1], params)[::-1]
    pairs = [
        both
        for part in range(0, 20, 2)
        for both in caption([decoder], grids[part : part + 2], image_ids[part : part + 2], params)
    ]
    assert len({len(found[0].words) for found in together}) > 1
    for others in (backwards, pairs):
        for found, other in zip(together, others, strict=True):
            assert [one.words for one in found] == [one.words for one in other]
            assert [one.score for one in found] == pytest.approx([one.score for one in other], abs=1e-4)


def test_words_read_ahead_change_no_caption() -> None:
    torch.manual_seed(5)
    decoder, grids = real_decoder(), torch.randn(5, 6, 5, dtype=torch.float64)
    params = replace(SearchParams.greedy(max_length=9), beam_size=3)
    plain = caption([decoder], grids, range(5), params)
    ahead = caption([decoder], grids, range(5), params, precompute([decoder], params))
    for (one,), (other,) in zip(plain, ahead, strict=True):
        assert one.words == other.words
        assert one.score == pytest.approx(other.score, rel=1e-9)


def test_an_ensemble_averages_probabilities() -> None:
    torch.manual_seed(6)
    decoders, grids = (
        [real_decoder(state=8), real_decoder(state=5), real_decoder(state=3)],
        torch.randn(4, 6, 5, dtype=torch.float64),
    )
    params = replace(SearchParams.greedy(max_length=6), beam_size=3, n_best=3)
    for grid, found in zip(grids, caption(decoders, grids, range(4), params), strict=True):
        for one in found:
            read = torch.tensor([[[START, *one.words, END]]])
            with torch.no_grad():
                spoken = [decoder(grid.unsqueeze(0), read[:, :, :-1]) for decoder in decoders]
            probabilities = torch.stack([logits.softmax(dim=-1) for logits, _ in spoken]).mean(dim=0)
            said = probabilities.log().gather(-1, read[:, :, 1:].unsqueeze(-1)).flatten()[: min(len(one.words) + 1, 6)]
            assert one.log_probability == pytest.approx(float(said.sum()), rel=1e-6)
            looked = torch.stack([attention for _, attention in spoken]).mean(dim=0)[0, 0, : len(one.words)]
            torch.testing.assert_close(one.attention, looked.float())


def test_an_ensemble_of_one_model_twice_is_that_model() -> None:
    torch.manual_seed(7)
    decoder, grids = real_decoder(), torch.randn(4, 6, 5, dtype=torch.float64)
    params = replace(SearchParams.greedy(max_length=6), beam_size=2)
    for (one,), (two,) in zip(
        caption([decoder], grids, range(4), params), caption([decoder, decoder], grids, range(4), params), strict=True
    ):
        assert one.words == two.words
        assert one.score == pytest.approx(two.score, rel=1e-6)


def test_an_image_for_which_no_word_is_possible_has_an_empty_caption() -> None:
    silent: list[Table] = [{1: {UNK: 1.0}}, {1: {A: 1.0}, A: {A: 1.0}}]
    first, second = table_search(silent, replace(settings(beam_size=2), no_repeat_ngram_size=1, min_length=2))
    assert [(one.words, one.log_probability, one.score) for one in first] == [((), 0.0, 0.0)]
    assert [one.words for one in second] == [(A,)]


def test_groups_begin_with_different_words() -> None:
    even: list[Table] = [{1: {A: 0.5, B: 0.3, C: 0.2}}]
    found = table_search(even, replace(settings(beam_size=3), num_groups=3, diversity_penalty=9.0))[0]
    assert [one.words for one in found] == [(A,), (B,), (C,)]
    assert [math.exp(one.score) for one in found] == pytest.approx([0.5, 0.3, 0.2])
    alike = table_search(even, replace(settings(beam_size=3), num_groups=3, diversity_penalty=0.0))[0]
    assert [one.words for one in alike] == [(A,)]


def test_words_are_drawn_as_often_as_they_are_likely() -> None:
    table: list[Table] = [{1: {A: 0.5, B: 0.3, C: 0.2}}] * 1500
    drawing = replace(SearchParams.greedy(max_length=2), method="sample")
    for changes, wanted in (
        ({}, {A: 0.5, B: 0.3, C: 0.2}),
        ({"temperature": 0.5}, {A: 0.25 / 0.38, B: 0.09 / 0.38, C: 0.04 / 0.38}),
        ({"top_k": 2}, {A: 0.625, B: 0.375}),
        ({"top_p": 0.7}, {A: 0.625, B: 0.375}),
        ({"top_p": 0.4}, {A: 1.0}),
        ({"top_k": 1}, {A: 1.0}),
    ):
        drawn = Counter(one.words[0] for (one,) in table_search(table, replace(drawing, **changes)))
        assert {word: times / 1500 for word, times in drawn.items()} == pytest.approx(wanted, abs=0.04), changes


def test_another_seed_or_image_draws_other_words_and_more_draws_leave_the_first() -> None:
    table: list[Table] = [{1: {A: 0.5, B: 0.5}, A: {A: 0.5, B: 0.5}, B: {A: 0.5, B: 0.5}}] * 30
    drawing = replace(SearchParams.greedy(max_length=8), method="sample", n_best=2)
    found = table_search(table, drawing)
    assert found != table_search(table, replace(drawing, seed=1))
    assert len({one.words for draws in found for one in draws}) > 40
    more = table_search(table, replace(drawing, n_best=5))
    assert [[one.words for one in draws[:2]] for draws in more] == [[one.words for one in draws] for draws in found]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"min_length": 31}, "min_length must be at most max_length, 30, got 31"),
        ({"num_groups": 2}, "groups must divide beam, 5, got 2"),
        ({"n_best": 6}, "n_best must be at most beam, 5, got 6; a wider beam finds more"),
        ({"diversity_penalty": 0.5}, "diversity must be 0, got 0.5: it is between groups; set groups to 2 or more"),
        ({"top_p": 0.9}, "top_p must be 1, got 0.9: method beam draws nothing; or set method to sample"),
        ({"method": "sample"}, "beam must be 1, got 5: method sample draws each caption apart; n_best says how many"),
        (
            {"length_normalization": "none"},
            "length_alpha must be 0 with length_normalization none, got 0.5; set it to 0, or",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_told(changes: dict[str, object], sentence: str) -> None:
    values = read_yaml(Path("params.yaml"))["generate"]["search"]
    with pytest.raises(UserError) as error:
        check(values | changes, "generate.search", SearchParams, "params.yaml")
    assert f"params.yaml: generate.search: {sentence}" in str(error.value)
