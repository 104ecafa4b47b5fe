"""Additive scores and their gradients against the direct formula."""

import shutil

import pytest
import torch
from torch import Tensor

from pipeline.decoder import additive_scores as module
from pipeline.decoder.additive_scores import additive_scores


def random_inputs(num_images: int, num_captions: int, num_regions: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys [B, P, A], query [B, K, A], weight [A] and the gradient of the scores [B, K, P]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_images, num_regions, size), (num_images, num_captions, size), (size,)]
    keys, query, weight = (torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes)
    return [keys, query, weight, torch.randn(num_images, num_captions, num_regions, generator=generator, dtype=dtype)]


@pytest.mark.parametrize("buffer_size", [1, 100, 10**6], ids=["one image at a time", "a few images", "all images"])
def test_scores_and_gradients_equal_the_direct_formula(buffer_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUFFER_SIZE", buffer_size)
    keys, query, weight, grad_output = random_inputs(5, 2, 4, 3, torch.float64)
    scores = additive_scores(keys, query, weight)
    expected = torch.relu(keys.unsqueeze(1) + query.unsqueeze(2)) @ weight
    torch.testing.assert_close(scores, expected)
    gradients = torch.autograd.grad(scores, (keys, query, weight), grad_output)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (keys, query, weight), grad_output))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compilation needs g++")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("num_images", [5, 2])
def test_compiled_scores_and_gradients_are_equal(num_images: int) -> None:
    keys, query, weight, grad_output = random_inputs(num_images, 3, 9, 16, torch.float32)
    scores = additive_scores(keys, query, weight, compiled=True)
    expected = additive_scores(keys, query, weight)
    torch.testing.assert_close(scores, expected)
    gradients = torch.autograd.grad(scores, (keys, query, weight), grad_output)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (keys, query, weight), grad_output))
