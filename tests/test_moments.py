import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.features.encoder import GridEncoder
from pipeline.features.quantization.moments import NUM_STDS, Moments, dead_leaves, estimate_moments
from tests.factories import random_encoder


@pytest.fixture(scope="module")
def encoder() -> GridEncoder:
    return random_encoder("resnet18", "layer2", 4)


def moments_of(mean: float, std: float) -> Moments:
    return Moments(mean=torch.tensor([mean], dtype=torch.float64), std=torch.tensor([std], dtype=torch.float64))


@given(mean=st.floats(-3, 3), std=st.floats(0, 3), seed=st.integers(0, 100))
def test_moments_after_relu_match_samples(mean, std, seed):
    generator = torch.Generator().manual_seed(seed)
    samples = (mean + std * torch.randn(20_000, generator=generator, dtype=torch.float64)).clamp_min(0)

    moments = moments_of(mean, std).after_relu()

    assert moments.mean.item() == pytest.approx(samples.mean().item(), abs=0.04 * (std + 0.01))
    assert moments.std.item() == pytest.approx(samples.std().item(), abs=0.04 * (std + 0.01))


def test_variances_of_a_sum_add_up():
    total = moments_of(1, 3) + moments_of(2, 4)

    assert (total.mean.item(), total.std.item()) == (3, 5)


def test_the_upper_bound_is_not_negative():
    assert moments_of(1, 2).upper_bound().item() == 1 + NUM_STDS * 2
    assert moments_of(-100, 2).upper_bound().item() == 0


@pytest.mark.slow
def test_larger_moments_of_the_batch_norm_are_used(encoder):
    encoder = copy.deepcopy(encoder)
    before = estimate_moments(encoder)[encoder.bn1]
    encoder.bn1.weight.data[3] *= 100

    # A larger weight raises both the measured moments and those stored by the batch norm.
    after = estimate_moments(encoder)[encoder.bn1]
    assert after.std[3] > 50 * before.std[3]

    encoder.bn1.weight.data[3] /= 100
    encoder.bn1.bias.data[5] = 40
    encoder.bn1.running_mean[5] += 39 * (encoder.bn1.running_var[5].sqrt() / encoder.bn1.weight[5].abs())
    shifted = estimate_moments(encoder)[encoder.bn1]
    assert shifted.mean[5] == 40
    assert shifted.upper_bound()[5] == pytest.approx(40 + NUM_STDS * encoder.bn1.weight[5].abs().item())


@pytest.mark.slow
def test_untrained_batch_norms_are_measured():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = GridEncoder("resnet18", "layer2").eval()

    moments = estimate_moments(encoder)[encoder.bn1]

    # The running statistics of an untrained batch norm would give a mean of 0 and a standard deviation of 1.
    assert moments.mean.abs().max() > 0
    assert (moments.std - 1).abs().max() > 0.1


def test_dead_leaves_depend_on_the_seed_alone():
    images = dead_leaves(2, 32, seed=1)

    assert images.shape == (2, 32, 32, 3)
    assert np.array_equal(images, dead_leaves(2, 32, seed=1))
    assert not np.array_equal(images, dead_leaves(2, 32, seed=2))
