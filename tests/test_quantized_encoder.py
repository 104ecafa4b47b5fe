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
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from benchmarks.encoding import add_noise, relative_error
from pipeline.errors import UserError
from pipeline.features.encoder import (
    GridEncoder,
    Precision,
    encode_batch,
    encode_grids,
    optimize_for_inference,
    read_encoder,
)
from pipeline.features.images import read_image
from pipeline.features.quantization.moments import dead_leaves
from pipeline.features.quantization.quantized_encoder import (
    Kernel,
    QuantizedConvolution,
    QuantizedEncoder,
    supports_int8,
)
from tests.factories import random_encoder
from tests.paths import REAL

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not supports_int8(), reason="this CPU has no VNNI instructions")


@pytest.fixture(scope="module")
def resnets() -> dict[str, GridEncoder]:
    return {architecture: random_encoder(architecture, "layer3", 8) for architecture in ("resnet18", "resnet50")}


def batch_norms(encoder: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]


def cosine_similarity(grids: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the cosine similarity of each region's features, [B, P]."""
    grids, expected = grids.astype(float), expected.astype(float)
    return (grids * expected).sum(-1) / np.sqrt((grids**2).sum(-1) * (expected**2).sum(-1))


def encode_in(precision: Precision, encoder: GridEncoder, images: np.ndarray) -> np.ndarray:
    return encode_grids(optimize_for_inference(encoder, precision, False, CPU), images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [
        "resnet18",
        "resnet50",
        "resnext50_32x4d",
        "resnext101_32x8d",
        "resnext101_64x4d",
        "wide_resnet50_2",
        "wide_resnet101_2",
    ],
)
def test_quantization_changes_grids_about_as_much_as_invisible_noise(resnets, architecture):
    """Deep random networks amplify every difference, so no absolute tolerance would suit both."""
    images = dead_leaves(4, 64, seed=5)
    encoder = resnets.get(architecture) or random_encoder(architecture, "layer3", 8)
    float32, int8 = (encode_in(precision, encoder, images) for precision in ("float32", "int8"))
    noisy = encode_in("float32", encoder, add_noise(images))

    assert int8.shape == float32.shape
    assert int8.dtype == np.float16
    assert 0 < relative_error(int8, float32) < 1.5 * relative_error(noisy, float32)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real photographs in ../shared/real")
def test_grids_of_photographs_are_close_to_float32():
    encoder = read_encoder(REAL / "weights" / "resnet18-imagenet-to-layer3.pth", "resnet18", "layer3")
    files = [*sorted((REAL / "coco/images").glob("*.jpg"))[:16], *sorted((REAL / "flickr/images").glob("*.jpg"))[:16]]
    images = np.stack([read_image(file, 224) for file in files])

    float32, int8 = (encode_in(precision, encoder, images) for precision in ("float32", "int8"))

    cosines = cosine_similarity(int8, float32)
    assert cosines.mean() > 0.997
    assert np.quantile(cosines, 0.01) > 0.985


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_grids_have_the_same_bits_at_every_batch_size_and_number_of_threads(resnets, architecture):
    network = QuantizedEncoder(resnets[architecture])
    images = dead_leaves(17, 64, seed=7)
    expected = encode_grids(network, images)
    num_threads = torch.get_num_threads()

    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            single = [encode_grids(network, images[i : i + 1])[0] for i in (0, 8, 16)]
            padded = encode_batch(network, images[5:8])
        finally:
            torch.set_num_threads(num_threads)
        assert np.array_equal(np.stack(single), expected[[0, 8, 16]])
        assert np.array_equal(padded, expected[5:8])


def uniform(*shape: int, seed: int, low: float = -1, high: float = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def random_activations(*shape: int, seed: int, high: float = 256) -> torch.Tensor:
    activations = uniform(*shape, seed=seed, low=0, high=high).to(torch.uint8)
    return activations.contiguous(memory_format=torch.channels_last)


def reference_convolution(
    kernel: Kernel,
    stride: int,
    padding: int,
    input_scale: torch.Tensor,
    zero_point: torch.Tensor,
    activations: torch.Tensor,
) -> torch.Tensor:
    """Convolve in float64, with the weights of each output channel rounded to steps of 1/127 of the largest."""
    groups = len(input_scale) // kernel.weight.shape[1]
    row_scale = input_scale.view(groups, -1).repeat_interleave(len(kernel.weight) // groups, 0)
    weight = kernel.weight * row_scale[:, :, None, None]
    step = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    weight = (weight / step).round() * step
    activations = activations - zero_point[:, None, None]
    return functional.conv2d(activations, weight, kernel.bias, stride, padding, groups=groups)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "groups"), [(1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (7, 2, 0, 1), (3, 2, 1, 4)]
)
def test_a_convolution_equals_that_of_the_rounded_weights(size, stride, padding, groups):
    kernel = Kernel(weight=uniform(24, 8 // groups, size, size, seed=1), bias=uniform(24, seed=2, high=3))
    input_scale = uniform(8, seed=3, low=0.001, high=0.02)
    output_scale = uniform(24, seed=4, low=0.02, high=0.06)
    zero_point = uniform(8, seed=5, low=100, high=120) if padding == 0 else torch.zeros(8, dtype=torch.float64)
    activations = random_activations(2, 8, 12, 12, seed=6)
    expected = reference_convolution(kernel, stride, padding, input_scale, zero_point, activations).clamp_min(0)

    offset = zero_point if groups == 1 else None
    float32 = QuantizedConvolution(kernel, stride, padding, input_scale, None, offset)(activations)
    uint8 = QuantizedConvolution(kernel, stride, padding, input_scale, output_scale, offset)(activations)

    assert float32.dtype == torch.float32
    torch.testing.assert_close(float32.double(), expected, rtol=1e-4, atol=1e-4)
    assert uint8.dtype == torch.uint8
    error = (uint8.double() - (expected / output_scale[:, None, None]).clamp_max(255)).abs()
    assert error.max() < 0.501  # correct rounding


def test_a_convolution_adds_to_the_residual_in_place():
    kernel = Kernel(weight=uniform(16, 8, 3, 3, seed=1), bias=uniform(16, seed=2))
    input_scale, output_scale = uniform(8, seed=3, low=0.001, high=0.02), uniform(16, seed=4, low=0.02, high=0.06)
    activations = random_activations(2, 8, 6, 6, seed=8, high=200)
    residual = random_activations(2, 16, 6, 6, seed=16, high=200)
    zero_point = torch.zeros(8, dtype=torch.float64)
    convolved = reference_convolution(kernel, 1, 1, input_scale, zero_point, activations) / output_scale[:, None, None]
    expected = (convolved + 0.75 * residual.double()).clamp(0, 255)

    result = QuantizedConvolution(kernel, 1, 1, input_scale, output_scale).add_to_residual(residual, 0.75, activations)

    assert (result.double() - expected).abs().max() < 0.501
    assert torch.equal(residual, result)


def test_concatenated_inputs_add_their_convolutions():
    main = Kernel(weight=uniform(4, 3, 3, 3, seed=1), bias=uniform(4, seed=2))
    shortcut = Kernel(weight=uniform(4, 5, 1, 1, seed=3), bias=uniform(4, seed=4))
    main_input, shortcut_input = uniform(1, 3, 6, 6, seed=5), uniform(1, 5, 6, 6, seed=6)

    combined = main.concat_inputs(shortcut)

    torch.testing.assert_close(
        functional.conv2d(torch.cat([main_input, shortcut_input], 1), combined.weight, combined.bias, padding=1),
        functional.conv2d(main_input, main.weight, main.bias, padding=1)
        + functional.conv2d(shortcut_input, shortcut.weight, shortcut.bias),
    )


@pytest.mark.slow
def test_the_border_is_padded_with_the_mean_color(resnets):
    """Zero padding of normalized images is padding of unnormalized ones with ImageNet's mean."""
    gray = np.full((1, 64, 64, 3), (124, 116, 104), dtype=np.uint8)

    float32, int8 = (encode_in(precision, resnets["resnet18"], gray) for precision in ("float32", "int8"))

    assert cosine_similarity(int8, float32).min() > 0.97


@pytest.mark.slow
def test_weights_with_folded_batch_norms_give_similar_grids(resnets, tmp_path):
    encoder = resnets["resnet18"]
    folded = copy.deepcopy(encoder)
    for norm in batch_norms(folded):
        # As in weights files whose batch norms only add a bias.
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        convolution_of(folded, norm).weight.data *= scale[:, None, None, None]
        norm.bias.data -= norm.running_mean * scale
        norm.weight.data.fill_(1)
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
    images = dead_leaves(2, 64, seed=11)

    expected, grids = (encode_grids(QuantizedEncoder(network), images) for network in (encoder, folded))

    assert cosine_similarity(grids, expected).min() > 0.97


def convolution_of(encoder: nn.Module, norm: nn.BatchNorm2d) -> nn.Conv2d:
    modules = [module for module in encoder.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    convolution = modules[modules.index(norm) - 1]
    assert isinstance(convolution, nn.Conv2d)
    return convolution


@pytest.mark.slow
def test_channels_that_are_always_zero_are_supported(resnets):
    encoder = copy.deepcopy(resnets["resnet18"])
    first = encoder.layer1[0]
    for tensor in (first.bn1.weight, first.bn1.bias, first.bn1.running_mean, encoder.layer3[1].conv2.weight):
        tensor.data.zero_()
    images = dead_leaves(2, 64, seed=13)

    float32, int8 = (encode_in(precision, encoder, images) for precision in ("float32", "int8"))

    assert cosine_similarity(int8, float32).min() > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error(resnets, value):
    encoder = copy.deepcopy(resnets["resnet18"])
    encoder.layer2[0].conv1.weight.data[0, 0, 0, 0] = value

    with pytest.raises(UserError, match=r"encode\.weights: .*NaN"):
        optimize_for_inference(encoder, "int8", False, CPU)


@pytest.mark.slow
def test_a_negative_variance_is_an_error(resnets):
    encoder = copy.deepcopy(resnets["resnet18"])
    encoder.layer2[0].bn1.running_var[3] = -1

    with pytest.raises(UserError, match=r"encode\.weights: .*negative running variances"):
        optimize_for_inference(encoder, "int8", False, CPU)


@pytest.mark.slow
def test_threads_can_share_a_network(resnets):
    images = dead_leaves(8, 64, seed=15)
    expected = encode_grids(QuantizedEncoder(resnets["resnet50"]), images)
    network = QuantizedEncoder(resnets["resnet50"])

    with ThreadPoolExecutor(4) as pool:
        grids = list(pool.map(lambda start: encode_grids(network, images[start : start + 2]), (0, 2, 4, 6)))

    assert np.array_equal(np.concatenate(grids), expected)


@pytest.mark.slow
def test_features_outside_the_range_of_float16_are_an_error(resnets):
    encoder = copy.deepcopy(resnets["resnet18"])
    encoder.layer3[1].bn2.bias.data.fill_(1e6)

    with pytest.raises(UserError, match="range of float16"):
        encode_grids(optimize_for_inference(encoder, "int8", False, CPU), dead_leaves(1, 64, seed=0))


def encode_with_isa(isa: str, encoder: GridEncoder, folder: Path) -> subprocess.CompletedProcess[str]:
    """Print a digest of grids from a process whose oneDNN is limited to the instructions `isa`."""
    save_file(encoder.state_dict(), folder / "resnet18.safetensors")
    program = f"""
import hashlib, pathlib, torch
from pipeline.features.encoder import encode_grids, optimize_for_inference, read_encoder
from pipeline.features.quantization.moments import dead_leaves
encoder = read_encoder(pathlib.Path({str(folder / "resnet18.safetensors")!r}), "resnet18", "layer3")
network = optimize_for_inference(encoder, "int8", False, torch.device("cpu"))
print(hashlib.sha256(encode_grids(network, dead_leaves(2, 64, seed=1)).tobytes()).hexdigest())
"""
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_cpu_without_vnni_is_an_error(resnets, tmp_path):
    process = encode_with_isa("AVX2", resnets["resnet18"], tmp_path)  # CPUs of 2013

    assert "encode.precision: " in process.stderr
    assert "VNNI" in process.stderr


@pytest.mark.slow
def test_other_vnni_instructions_give_the_same_bits(resnets, tmp_path):
    process = encode_with_isa("AVX2_VNNI", resnets["resnet18"], tmp_path)
    if "encode.precision: " in process.stderr:
        pytest.skip("this CPU has only AVX-512 VNNI")

    expected = encode_grids(QuantizedEncoder(resnets["resnet18"]), dead_leaves(2, 64, seed=1))

    assert process.stdout.split() == [hashlib.sha256(expected.tobytes()).hexdigest()]
