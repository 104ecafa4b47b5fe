import copy
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from benchmarks.encoding import distance, disturbed
from pipeline.errors import UserError
from pipeline.features.encoder import (
    GridEncoder,
    encode_batch,
    encode_grids,
    for_inference,
    read_encoder,
)
from pipeline.features.images import read_image
from pipeline.features.quantization.moments import REACH, Moments, dead_leaves, find_moments
from pipeline.features.quantization.quantized_encoder import (
    Kernel,
    QuantizedConvolution,
    QuantizedEncoder,
    multiplies_exactly,
)
from tests.factories import encode_params

REAL = Path(__file__).parents[2] / "shared" / "real"

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not multiplies_exactly(), reason="this processor has no VNNI instructions")


@pytest.fixture(scope="module")
def resnets() -> dict[str, GridEncoder]:
    """Random ones, whose batch norms have met pictures, as those of trained ones have."""
    made = {}
    for architecture, layer in (("resnet18", "layer3"), ("resnet50", "layer3")):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            encoder = GridEncoder(architecture, layer)
        for norm in norms(encoder):
            norm.momentum = 1.0
        with torch.no_grad():
            encoder.train()(torch.from_numpy(dead_leaves(8, 64, seed=3)).permute(0, 3, 1, 2).float() / 64 - 2)
        made[architecture] = encoder.eval().requires_grad_(False)
    return made


def norms(encoder: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]


def agreement(grids: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine of each region's features, [B, P]."""
    one, other = grids.astype(float), others.astype(float)
    return (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_grids_change_no_more_than_by_a_noise_that_nobody_sees(resnets, architecture):
    """Deep random networks multiply every difference, so that no distance as such would do for both."""
    pictures = dead_leaves(4, 64, seed=5)
    exact, whole = (for_inference(resnets[architecture], kind, False, CPU) for kind in ("float32", "int8"))

    expected, found = encode_grids(exact, pictures), encode_grids(whole, pictures)
    noisy = encode_grids(exact, disturbed(pictures))

    assert found.shape == expected.shape
    assert found.dtype == np.float16
    assert 0 < distance(found, expected) < 1.5 * distance(noisy, expected)


@pytest.mark.skipif(not REAL.is_dir(), reason="there are no photographs in shared/real")
def test_grids_of_photographs_are_near_those_of_float32():
    encoder = read_encoder(REAL / "weights" / "resnet18-imagenet-to-layer3.pth", "resnet18", "layer3")
    files = [*sorted((REAL / "coco/images").glob("*.jpg"))[:16], *sorted((REAL / "flickr/images").glob("*.jpg"))[:16]]
    pictures = np.stack([read_image(file, 224) for file in files])

    exact, whole = (encode_grids(for_inference(encoder, kind, False, CPU), pictures) for kind in ("float32", "int8"))

    cosines = agreement(whole, exact)
    assert cosines.mean() > 0.997
    assert np.quantile(cosines, 0.01) > 0.985


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_a_grid_has_the_same_bits_in_every_batch_and_with_any_number_of_threads(resnets, architecture):
    network = QuantizedEncoder(resnets[architecture])
    pictures = dead_leaves(17, 64, seed=7)
    expected = encode_grids(network, pictures)
    threads = torch.get_num_threads()

    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            alone = [encode_grids(network, pictures[i : i + 1])[0] for i in (0, 8, 16)]
            filled = encode_batch(network, pictures[5:8])
        finally:
            torch.set_num_threads(threads)
        assert np.array_equal(np.stack(alone), expected[[0, 8, 16]])
        assert np.array_equal(filled, expected[5:8])


def uniform(*shape: int, seed: int, low: float = -1, high: float = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def plainly(
    kernel: Kernel, stride: int, padding: int, taken: torch.Tensor, zero: torch.Tensor, whole: torch.Tensor
) -> torch.Tensor:
    """The convolution in float64, with each output's weights rounded to 127 steps on either side of 0."""
    weight = kernel.weight * taken[:, None, None]
    step = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    weight = (weight / step).round() * step
    return functional.conv2d(whole - zero[:, None, None], weight, kernel.bias, stride, padding)


@pytest.mark.parametrize(("size", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (7, 2, 0)])
def test_a_convolution_is_that_of_the_rounded_weights(size, stride, padding):
    kernel = Kernel(weight=uniform(24, 8, size, size, seed=1), bias=uniform(24, seed=2, high=3))
    taken, given_scales = uniform(8, seed=3, low=0.001, high=0.02), uniform(24, seed=4, low=0.02, high=0.06)
    zero = uniform(8, seed=5, low=100, high=120) if padding == 0 else torch.zeros(8, dtype=torch.float64)
    whole = uniform(2, 8, 12, 12, seed=6, low=0, high=256).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    expected = plainly(kernel, stride, padding, taken, zero, whole).clamp_min(0)

    real = QuantizedConvolution(kernel, stride, padding, taken, None, zero)(whole)
    steps = QuantizedConvolution(kernel, stride, padding, taken, given_scales, zero)(whole)

    assert real.dtype == torch.float32
    torch.testing.assert_close(real.double(), expected, rtol=1e-4, atol=1e-4)
    assert steps.dtype == torch.uint8
    off = (steps.double() - (expected / given_scales[:, None, None]).clamp_max(255)).abs()
    assert off.max() < 0.501  # rounded, and rightly


def test_a_convolution_adds_to_a_stream_in_its_place():
    kernel = Kernel(weight=uniform(16, 8, 3, 3, seed=1), bias=uniform(16, seed=2))
    taken, scales = uniform(8, seed=3, low=0.001, high=0.02), uniform(16, seed=4, low=0.02, high=0.06)
    whole, stream = (
        uniform(2, count, 6, 6, seed=count, low=0, high=200)
        .to(torch.uint8)
        .contiguous(memory_format=torch.channels_last)
        for count in (8, 16)
    )
    plain = plainly(kernel, 1, 1, taken, torch.zeros(8, dtype=torch.float64), whole) / scales[:, None, None]
    expected = (plain + 0.75 * stream.double()).clamp(0, 255)

    found = QuantizedConvolution(kernel, 1, 1, taken, scales).onto(stream, 0.75, whole)

    assert (found.double() - expected).abs().max() < 0.501
    assert torch.equal(stream, found)


def test_joined_kernels_add_their_convolutions():
    main = Kernel(weight=uniform(4, 3, 3, 3, seed=1), bias=uniform(4, seed=2))
    shortcut = Kernel(weight=uniform(4, 5, 1, 1, seed=3), bias=uniform(4, seed=4))
    one, other = uniform(1, 3, 6, 6, seed=5), uniform(1, 5, 6, 6, seed=6)

    joined = main.beside(shortcut)

    torch.testing.assert_close(
        functional.conv2d(torch.cat([one, other], 1), joined.weight, joined.bias, padding=1),
        functional.conv2d(one, main.weight, main.bias, padding=1)
        + functional.conv2d(other, shortcut.weight, shortcut.bias),
    )


def test_pictures_beside_the_mean_are_told_apart_up_to_the_border(resnets):
    """Zeros around the normalized picture are ImageNet's mean around the picture itself."""
    encoder = resnets["resnet18"]
    gray = np.full((1, 64, 64, 3), (124, 116, 104), dtype=np.uint8)

    exact, whole = (encode_grids(for_inference(encoder, kind, False, CPU), gray) for kind in ("float32", "int8"))

    assert agreement(whole, exact).min() > 0.97


@given(mean=st.floats(-3, 3), deviation=st.floats(0, 3), seed=st.integers(0, 100))
def test_rectified_moments_are_those_of_samples(mean, deviation, seed):
    generator = torch.Generator().manual_seed(seed)
    samples = (mean + deviation * torch.randn(20_000, generator=generator, dtype=torch.float64)).clamp_min(0)
    moments = Moments(
        mean=torch.tensor([mean], dtype=torch.float64), deviation=torch.tensor([deviation], dtype=torch.float64)
    ).rectified

    assert moments.mean.item() == pytest.approx(samples.mean().item(), abs=0.04 * (deviation + 0.01))
    assert moments.deviation.item() == pytest.approx(samples.std().item(), abs=0.04 * (deviation + 0.01))


def test_what_a_batch_norm_learned_counts_where_it_reaches_further(resnets):
    encoder = copy.deepcopy(resnets["resnet18"])
    before = find_moments(encoder)[encoder.bn1]
    encoder.bn1.weight.data[3] *= 100

    # Its outputs grow with its weight, so that both that it learned and what is measured do.
    after = find_moments(encoder)[encoder.bn1]
    assert after.deviation[3] > 50 * before.deviation[3]

    encoder.bn1.weight.data[3] /= 100
    encoder.bn1.bias.data[5] = 40
    encoder.bn1.running_mean[5] += 39 * (encoder.bn1.running_var[5].sqrt() / encoder.bn1.weight[5].abs())
    shifted = find_moments(encoder)[encoder.bn1]
    assert shifted.mean[5] == 40
    assert shifted.largest[5] == pytest.approx(40 + REACH * encoder.bn1.weight[5].abs().item())


def test_weights_with_batch_norms_folded_in_give_nearly_the_same(resnets, tmp_path):
    encoder = resnets["resnet18"]
    folded = copy.deepcopy(encoder)
    for norm in norms(folded):
        # As in files whose batch norms only carry a bias.
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        convolution_of(folded, norm).weight.data *= scale[:, None, None, None]
        norm.bias.data -= norm.running_mean * scale
        norm.weight.data.fill_(1)
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
    pictures = dead_leaves(2, 64, seed=11)

    one, other = (encode_grids(QuantizedEncoder(each), pictures) for each in (encoder, folded))

    assert agreement(one, other).min() > 0.97


def convolution_of(encoder: nn.Module, norm: nn.BatchNorm2d) -> nn.Conv2d:
    modules = [module for module in encoder.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    before = modules[modules.index(norm) - 1]
    assert isinstance(before, nn.Conv2d)
    return before


def test_channels_that_are_always_zero_stay_so(resnets):
    encoder = copy.deepcopy(resnets["resnet18"])
    first = encoder.layer1[0]
    for tensor in (first.bn1.weight, first.bn1.bias, first.bn1.running_mean, encoder.layer3[1].conv2.weight):
        tensor.data.zero_()
    pictures = dead_leaves(2, 64, seed=13)

    exact, whole = (encode_grids(for_inference(encoder, kind, False, CPU), pictures) for kind in ("float32", "int8"))

    assert agreement(whole, exact).min() > 0.97


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_an_error(resnets, value):
    encoder = copy.deepcopy(resnets["resnet18"])
    encoder.layer2[0].conv1.weight.data[0, 0, 0, 0] = value

    with pytest.raises(UserError, match=r"encode\.weights hold values that are NaN or infinite"):
        for_inference(encoder, "int8", False, CPU)


def test_a_variance_below_zero_is_an_error(resnets):
    encoder = copy.deepcopy(resnets["resnet18"])
    encoder.layer2[0].bn1.running_var[3] = -1

    with pytest.raises(UserError, match=r"encode\.weights hold .* variances below 0"):
        for_inference(encoder, "int8", False, CPU)


def test_threads_that_share_a_new_network_get_the_grids_of_one(resnets):
    pictures = dead_leaves(8, 64, seed=15)
    expected = encode_grids(QuantizedEncoder(resnets["resnet50"]), pictures)
    network = QuantizedEncoder(resnets["resnet50"])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: encode_grids(network, pictures[start : start + 2]), (0, 2, 4, 6)))

    assert np.array_equal(np.concatenate(found), expected)


def test_features_beyond_float16_are_an_error(resnets):
    encoder = copy.deepcopy(resnets["resnet18"])
    encoder.layer3[1].bn2.bias.data.fill_(1e6)

    with pytest.raises(UserError, match="beyond float16"):
        encode_grids(for_inference(encoder, "int8", False, CPU), dead_leaves(1, 64, seed=0))


def encoded_with(instructions: str, encoder: GridEncoder, folder: Path) -> subprocess.CompletedProcess[str]:
    """Encode two pictures in a process whose oneDNN uses no newer instructions; it prints a digest of their grids."""
    save_file(encoder.state_dict(), folder / "resnet18.safetensors")
    program = f"""
import hashlib, pathlib, torch
from pipeline.features.encoder import encode_grids, for_inference, read_encoder
from pipeline.features.quantization.moments import dead_leaves
encoder = read_encoder(pathlib.Path({str(folder / "resnet18.safetensors")!r}), "resnet18", "layer3")
network = for_inference(encoder, "int8", False, torch.device("cpu"))
print(hashlib.sha256(encode_grids(network, dead_leaves(2, 64, seed=1)).tobytes()).hexdigest())
"""
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": instructions},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_processor_that_would_cut_sums_is_refused(resnets, tmp_path):
    ended = encoded_with("AVX2", resnets["resnet18"], tmp_path)  # what processors had in 2013

    assert "encode.precision int8 needs a processor with VNNI instructions" in ended.stderr


def test_other_instructions_give_the_same_bits(resnets, tmp_path):
    ended = encoded_with("AVX2_VNNI", resnets["resnet18"], tmp_path)
    if "needs a processor with VNNI" in ended.stderr:
        pytest.skip("this processor has VNNI with AVX-512 alone")

    expected = encode_grids(QuantizedEncoder(resnets["resnet18"]), dead_leaves(2, 64, seed=1))

    assert ended.stdout.split() == [hashlib.sha256(expected.tobytes()).hexdigest()]


def test_int8_is_not_compiled():
    with pytest.raises(ValueError, match="compile must be false with precision int8"):
        encode_params("weights.pth", precision="int8", compile=True)
