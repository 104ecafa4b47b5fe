"""The batched search against tables worked by hand and against every possible sentence."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pipeline.captions.vocabulary import END, UNKNOWN
from pipeline.decoder.search import Hypothesis, SearchParams, search

A, B, C = 4, 5, 6
VOCABULARY = 7

# What follows what, for two images: log-probabilities are the logarithms of these numbers.
WORKED = [
    # Greedy takes A (0.5) and can only go on with 0.4; the best sentence begins with B: 0.4 * 0.9 * 1.
    {1: {A: 0.5, B: 0.4, C: 0.1}, A: {B: 0.4, C: 0.3, END: 0.3}, B: {C: 0.9, END: 0.1}, C: {END: 1.0}},
    # The second image ends at once, and must wait for the first without changing.
    {1: {END: 0.6, A: 0.4}, A: {END: 1.0}, B: {END: 1.0}, C: {END: 1.0}},
]


def table_search(tables: list[dict[int, dict[int, float]]], params: SearchParams) -> list[list[Hypothesis]]:
    """Search in tables; a state is the image's number, the attention points at the last word's region."""

    def step(words: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.full((*words.shape, VOCABULARY), -torch.inf)
        for image, row in enumerate(words.tolist()):
            for beam, word in enumerate(row):
                assert int(state[image, beam]) == image
                for follower, probability in tables[image].get(word, {END: 1.0}).items():
                    logits[image, beam, follower] = math.log(probability)
        return logits, state, torch.nn.functional.one_hot(words, VOCABULARY).float()

    def choose(state: Tensor, beams: Tensor) -> Tensor:
        return state.gather(1, beams)

    start = torch.arange(len(tables)).unsqueeze(1)
    return search(step, choose, start, len(tables), params, torch.device("cpu"))


def settings(beam: int, max_words: int = 9, average: bool = False, unknown: bool = False) -> SearchParams:
    return SearchParams(
        beam=beam,
        max_words=max_words,
        length_exponent=1.0 if average else 0.0,
        allow_unknown=unknown,
    )


def test_greedy_search_takes_the_likeliest_word_each_time() -> None:
    first, second = table_search(WORKED, settings(beam=1))
    assert first[0].words == (A, B, C)
    assert math.exp(first[0].log_probability) == pytest.approx(0.5 * 0.4 * 0.9)
    assert second[0].words == ()
    assert math.exp(second[0].log_probability) == pytest.approx(0.6)


def test_a_beam_finds_the_better_sentence_that_greedy_search_misses() -> None:
    first, second = table_search(WORKED, settings(beam=2))
    assert first[0].words == (B, C)
    assert math.exp(first[0].score) == pytest.approx(0.4 * 0.9)
    assert [beam.words for beam in second] == [(), (A,)]


def test_the_average_ranks_longer_sentences_higher() -> None:
    ranked = table_search(WORKED, settings(beam=3, average=True))[1]
    assert [beam.words for beam in ranked] == [(A,), ()]
    assert ranked[0].score == pytest.approx(math.log(0.4) / 2)


def test_attention_follows_the_beam_it_belongs_to() -> None:
    best = table_search(WORKED, settings(beam=2))[0][0]
    assert best.words == (B, C)
    assert best.attention.argmax(dim=-1).tolist() == [1, B]


def test_a_caption_that_never_ends_is_returned_as_it_stands() -> None:
    endless = [{1: {A: 1.0}, A: {B: 0.5, A: 0.5}, B: {A: 1.0}}]
    best = table_search(endless, settings(beam=2, max_words=4))[0][0]
    assert len(best.words) == 4
    assert END not in best.words
    assert best.attention.shape == (4, VOCABULARY)


@pytest.mark.parametrize(("allowed", "words"), [(True, (UNKNOWN,)), (False, (A,))])
def test_unknown_words_stand_in_captions_only_where_allowed(allowed: bool, words: tuple[int, ...]) -> None:
    rare = [{1: {UNKNOWN: 0.9, A: 0.1}}]
    assert table_search(rare, settings(beam=1, unknown=allowed))[0][0].words == words


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
    found = table_search([table], settings(beam=200, max_words=4))[0]
    assert found[0].words == tuple(word for word in best if word != END)
    assert math.exp(found[0].log_probability) == pytest.approx(everything[best], rel=1e-5)
    assert len(found) == len(everything)
