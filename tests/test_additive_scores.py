import shutil

import pytest
import torch

from pipeline.decoder import energy


@pytest.fixture(params=[1, 100, 10**6], ids=["one image at a time", "a few", "all at once"])
def _room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "CACHED_NUMBERS", request.param)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compilation needs g++")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_energies_are_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    for images in (5, 2):
        keys, query, weight = (
            torch.randn(*shape, generator=generator, requires_grad=True)
            for shape in ((images, 9, 16), (images, 3, 16), (16,))
        )
        wanted = torch.randn(images, 3, 9, generator=generator)
        plain, compiled = (
            energy.additive_scores(keys, query, weight),
            energy.additive_scores(keys, query, weight, compiled=True),
        )
        torch.testing.assert_close(compiled, plain)
        of_plain = torch.autograd.grad(plain, (keys, query, weight), wanted)
        torch.testing.assert_close(torch.autograd.grad(compiled, (keys, query, weight), wanted), of_plain)


@pytest.mark.usefixtures("_room")
def test_energies_and_gradients_are_those_of_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, query, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 4, 3), (5, 2, 3), (3,))
    )
    wanted = torch.randn(5, 2, 4, generator=generator, dtype=torch.float64)
    fast = energy.additive_scores(keys, query, weight)
    slow = torch.relu(keys.unsqueeze(1) + query.unsqueeze(2)) @ weight
    torch.testing.assert_close(fast, slow)
    of_fast = torch.autograd.grad(fast, (keys, query, weight), wanted)
    of_slow = torch.autograd.grad(slow, (keys, query, weight), wanted)
    torch.testing.assert_close(of_fast, of_slow)
