"""Scheduled sampling."""

import pytest
import torch

from pipeline.captions.vocabulary import END, PAD, START
from pipeline.training.scheduled_sampling import mix_in_predictions

VOCAB_SIZE = 9
TOKENS = torch.tensor([[[START, 5, 6, END], [START, 7, PAD, PAD]]]).repeat(500, 1, 1)  # [B, K, T]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def logits() -> torch.Tensor:
    return torch.zeros(500, 2, 3, VOCAB_SIZE)  # every word is equally likely


def test_rate_0_keeps_the_reference_words() -> None:
    assert torch.equal(mix_in_predictions(TOKENS, logits(), 0.0), TOKENS)


def test_start_and_padding_stay_and_are_never_sampled() -> None:
    mixed = mix_in_predictions(TOKENS, logits(), 1.0)
    assert torch.equal(mixed[:, :, 0], TOKENS[:, :, 0])
    assert torch.equal(mixed == PAD, TOKENS == PAD)
    assert not (mixed[:, :, 1:] == START).any()
    assert set(mixed[:, 0, 1:].flatten().tolist()) == set(range(VOCAB_SIZE)) - {PAD, START}


def test_the_rate_is_the_fraction_of_replaced_words() -> None:
    certain = logits()
    certain[..., 8] = 100.0  # word 8, which no reference has, is always sampled
    mixed = mix_in_predictions(TOKENS, certain, 0.3)
    words = TOKENS[:, :, 1:] != PAD
    assert (mixed[:, :, 1:][words] == 8).double().mean().item() == pytest.approx(0.3, abs=0.05)
    assert set(mixed[:, :, 1:][words].tolist()) == {5, 6, 7, 8, END}


def test_words_are_those_that_multinomial_samples() -> None:
    values = torch.randn(500, 2, 3, VOCAB_SIZE)
    state = torch.get_rng_state()
    mixed = mix_in_predictions(TOKENS, values.clone(), 1.0)
    torch.set_rng_state(state)
    values[..., [PAD, START]] = -torch.inf
    sampled = torch.multinomial(values.softmax(dim=-1).flatten(0, 2), 1).view(500, 2, 3)
    words = TOKENS[:, :, 1:] != PAD
    assert torch.equal(mixed[:, :, 1:][words], sampled[words])
