"""Rules of one search step, on tables worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.captions.vocabulary import END, PAD, START
from pipeline.generation.step_rules import beam_step, fixed_point_cumsum, mask_forbidden, random_numbers, sample_step

A, B, C = 4, 5, 6
VOCAB_SIZE = 7


def log_probs(*rows: dict[int, float]) -> Tensor:
    """Make log-probabilities [1, K, V] from one table of probabilities per beam."""
    table = torch.zeros(1, len(rows), VOCAB_SIZE)
    for beam, row in enumerate(rows):
        for token, probability in row.items():
            table[0, beam, token] = probability
    return table.log()


@pytest.mark.parametrize(
    ("tokens", "n", "forbidden"),
    [
        ([START, A, B, A], 0, set()),
        ([START, A, B, A], 1, {START, A, B}),
        ([START, A, B, A], 2, {B}),
        ([START, A, B, A], 3, set()),
        ([START, A, B, C, A, B], 3, {C}),
        ([START], 2, set()),
    ],
)
def test_tokens_that_would_repeat_an_ngram_are_forbidden(tokens: list[int], n: int, forbidden: set[int]) -> None:
    values = torch.zeros(1, 1, VOCAB_SIZE)
    mask_forbidden(values, torch.tensor([[tokens]]), n, [PAD])
    assert set((values[0, 0] == -math.inf).nonzero().flatten().tolist()) == forbidden | {PAD}


def test_a_beam_step_chooses_the_best_sums_and_keeps_ended_captions() -> None:
    values = log_probs({A: 0.6, B: 0.4}, {A: 1.0})
    totals = torch.tensor([[0.5, 0.1]]).log()
    ended = torch.tensor([[False, True]])
    chosen = beam_step(values, totals, ended, beam_size=3, num_groups=1, diversity_penalty=0.0)
    # 0.5 * 0.6, 0.5 * 0.4, and the ended caption with 0.1
    assert chosen.beam_index.tolist() == [[0, 0, 1]]
    assert chosen.tokens.tolist() == [[A, B, PAD]]
    assert chosen.log_probs.exp().tolist() == [pytest.approx([0.6, 0.4, 1.0])]


def test_beams_without_continuation_have_probability_0() -> None:
    values = log_probs({A: 1.0})
    chosen = beam_step(values, torch.zeros(1, 1), torch.tensor([[False]]), 2, num_groups=1, diversity_penalty=0.0)
    assert chosen.tokens.tolist() == [[A, PAD]]
    assert chosen.log_probs.tolist() == [[0.0, -math.inf]]


def test_a_later_group_is_penalized_and_its_log_probabilities_are_not() -> None:
    values = log_probs({A: 0.6, B: 0.4}, {A: 0.6, B: 0.4})
    totals, ended = torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)
    chosen = beam_step(values, totals, ended, beam_size=2, num_groups=2, diversity_penalty=1.0)
    assert chosen.beam_index.tolist() == [[0, 1]]
    assert chosen.tokens.tolist() == [[A, B]]
    assert chosen.log_probs.exp().tolist() == [pytest.approx([0.6, 0.4])]
    low_penalty = beam_step(values, totals, ended, beam_size=2, num_groups=2, diversity_penalty=0.1)
    assert low_penalty.tokens.tolist() == [[A, A]]


@pytest.mark.parametrize(
    ("uniform", "settings", "token"),
    [
        # In the order of ids: END, A, B.
        (0.0, {}, END),
        (0.19, {}, END),
        (0.21, {}, A),
        (0.69, {}, A),
        (0.71, {}, B),
        (1 - 2**-53, {}, B),
        # In descending order of probability: A, B, END.
        (0.49, {"top_k": 3}, A),
        (0.51, {"top_k": 3}, B),
        (0.99, {"top_k": 3}, END),
        (0.99, {"top_k": 2}, B),
        (0.99, {"top_p": 0.5}, A),
        (0.99, {"top_p": 0.51}, B),
        (0.5, {"temperature": 0.1}, A),
    ],
)
def test_a_sample_follows_the_cumulative_probability(uniform: float, settings: dict[str, float], token: int) -> None:
    values = log_probs({A: 0.5, B: 0.3, END: 0.2})
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    chosen = sample_step(values, torch.tensor([[False]]), torch.tensor([[uniform]], dtype=torch.float64), **options)  # type: ignore[arg-type]
    assert chosen.tokens.tolist() == [[token]]
    assert chosen.log_probs.exp().tolist() == [pytest.approx([{A: 0.5, B: 0.3, END: 0.2}[token]])]


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}])
def test_a_caption_that_no_word_may_follow_ends(settings: dict[str, float]) -> None:
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    chosen = sample_step(log_probs({}, {A: 1.0}), torch.tensor([[False, False]]), torch.full((1, 2), 0.5), **options)  # type: ignore[arg-type]
    assert chosen.tokens.tolist() == [[PAD, A]]
    assert chosen.log_probs.tolist() == [[0.0, 0.0]]


def test_an_ended_sample_continues_with_padding() -> None:
    values = log_probs({A: 1.0}, {A: 1.0})
    chosen = sample_step(values, torch.tensor([[True, False]]), torch.zeros(1, 2), 1.0, 0, 1.0)
    assert chosen.tokens.tolist() == [[PAD, A]]
    assert chosen.log_probs.tolist() == [[0.0, 0.0]]


def test_random_numbers_depend_on_seed_image_and_sample_alone() -> None:
    uniform = random_numbers(1, [7, 9], num_samples=3, max_length=5)
    assert uniform.shape == (2, 3, 5)
    assert torch.equal(random_numbers(1, [9], num_samples=2, max_length=5)[0], uniform[1, :2])
    assert len(set(uniform.flatten().tolist())) == uniform.numel()
    assert not torch.equal(random_numbers(2, [7, 9], num_samples=3, max_length=5), uniform)


def test_cumulative_sums_in_fixed_point_are_those_of_floats() -> None:
    probabilities = (9 * torch.randn(50, 2000, dtype=torch.float64)).softmax(dim=-1)
    sums = fixed_point_cumsum(probabilities)
    torch.testing.assert_close(sums, probabilities.cumsum(dim=-1), rtol=0, atol=1e-12)
    assert (sums.diff(dim=-1) >= 0).all()
    assert (sums.diff(dim=-1) > 0).any()
    impossible = probabilities.clone()
    impossible[:, 1000:] = 0
    assert torch.equal(
        fixed_point_cumsum(impossible)[:, 999:], fixed_point_cumsum(impossible)[:, 999:1000].expand(-1, 1001)
    )
