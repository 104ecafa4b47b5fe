"""Convolutions with few multiplications against those of PyTorch in float64."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.features.fused_blocks import FusedConvolution
from pipeline.features.winograd import WinogradConvolution

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="fused convolutions need oneDNN",
)


def make_convolution(in_channels: int, out_channels: int) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(in_channels, out_channels, 3, padding=1).requires_grad_(False)


def make_features(num_images: int, channels: int, height: int, width: int, seed: int = 1) -> Tensor:
    features = torch.randn(num_images, channels, height, width, generator=torch.Generator().manual_seed(seed))
    return features.to(memory_format=torch.channels_last)


def expected(convolution: nn.Conv2d, features: Tensor, shortcut: Tensor | None = None) -> Tensor:
    layer = nn.Conv2d(convolution.in_channels, convolution.out_channels, 3, padding=1).double()
    layer.load_state_dict(convolution.state_dict())
    result: Tensor = layer(features.double())
    if shortcut is not None:
        result = result + shortcut.double()
    return result.relu().float()


@pytest.mark.parametrize("num_images", [1, 3, 16])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (5, 14), (9, 2), (1, 1), (56, 40)])
def test_convolutions_equal_those_of_pytorch(num_images: int, height: int, width: int) -> None:
    convolution = make_convolution(64, 80)
    winograd = WinogradConvolution(convolution)
    features = make_features(num_images, 64, height, width)
    copy, shortcut = features.clone(), make_features(num_images, 80, height, width, seed=2)

    result = winograd(features)
    torch.testing.assert_close(result, expected(convolution, features), rtol=1e-4, atol=2e-5)
    assert result.is_contiguous(memory_format=torch.channels_last)
    summed = expected(convolution, features, shortcut)
    added = winograd(features, shortcut)
    assert added is shortcut
    torch.testing.assert_close(added, summed, rtol=1e-4, atol=2e-5)
    assert torch.equal(features, copy)


def test_the_bits_of_an_image_do_not_depend_on_the_other_images() -> None:
    winograd = WinogradConvolution(make_convolution(64, 64))
    features = make_features(16, 64, 14, 14)
    others = make_features(16, 64, 14, 14, seed=3)
    others[5] = features[5]
    assert torch.equal(winograd(features)[5], winograd(others)[5])


@pytest.mark.parametrize(
    ("shape", "pays"),
    [
        ((16, 64, 56, 56), True),  # the layers of a ResNet at 224 px
        ((16, 256, 14, 14), True),
        ((16, 512, 7, 7), True),
        ((1, 512, 7, 7), False),  # too few tiles for fast products
        ((1, 64, 112, 112), False),  # too many for the cache
        ((16, 64, 33, 5), False),  # half of the tiles would be padding
    ],
)
def test_it_is_used_where_it_pays(shape: tuple[int, ...], pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    convolve = WinogradConvolution.__call__

    def record(convolution: WinogradConvolution, features: Tensor, shortcut: Tensor | None = None) -> Tensor:
        used.append(features)
        return convolve(convolution, features, shortcut)

    monkeypatch.setattr(WinogradConvolution, "__call__", record)
    convolution = make_convolution(shape[1], 64)
    features = make_features(*shape)
    result = FusedConvolution(convolution)(features)
    torch.testing.assert_close(result, expected(convolution, features), rtol=1e-4, atol=1e-4)
    assert bool(used) == pays


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.Conv2d(64, 64, 3, padding=0),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.Conv2d(64, 72, 3, padding=1),
    ],
)
def test_other_convolutions_are_not_supported(convolution: nn.Conv2d) -> None:
    assert not WinogradConvolution.supports(convolution)
