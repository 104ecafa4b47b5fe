"""CLIP's ResNets: the network, the forms of its weights files, and its normalization."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.encoding import relative_error
from pipeline.errors import UserError
from pipeline.features.encoder import (
    GridEncoder,
    encode_grids,
    load_encoder,
    optimize_for_inference,
    read_encoder,
    weights_digest,
)
from pipeline.features.pretrained import download_weights
from pipeline.features.resnets import STRIDES, ClipResNet, Layer, num_channels
from tests import clip_reference
from tests.factories import encode_params
from tests.paths import ROOT

CPU = torch.device("cpu")
OPEN_CLIP_LAYERS = {"RN50": (3, 4, 6, 3), "RN101": (3, 4, 23, 3), "RN50x4": (4, 6, 10, 6), "RN50x16": (6, 8, 18, 8)}


def random_images(num_images: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_images, size, size, 3), dtype=np.uint8)


def random_state(architecture: ClipResNet, layer: Layer = "layer4") -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        encoder = GridEncoder(architecture, layer)
    return clip_reference.random_weights(encoder)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_state("RN50")


@pytest.fixture
def weights(state, tmp_path) -> Path:
    """A file as open_clip's: the ResNet below `visual.`, with attention pooling and a text encoder."""
    other = {
        "visual.attnpool.positional_embedding": torch.zeros(50, 2048),
        "transformer.resblocks.0.attn.in_proj_weight": torch.zeros(8, 8),
        "token_embedding.weight": torch.zeros(8, 8),
    }
    path = tmp_path / "open_clip_model.safetensors"
    save_file({f"visual.{name}": tensor for name, tensor in state.items()} | other, path)
    return path


@pytest.mark.parametrize("architecture", get_args(ClipResNet))
def test_sizes_of_grids(architecture: ClipResNet) -> None:
    for layer in get_args(Layer):
        with torch.device("meta"):
            shape = GridEncoder(architecture, layer)(torch.empty(1, 3, 64, 96)).shape
        stride = STRIDES[layer]
        assert tuple(shape[1:]) == (num_channels(architecture, layer), 64 // stride, 96 // stride)


@pytest.mark.parametrize("layer", get_args(Layer))
def test_grids_equal_those_of_the_reference(state, weights, layer: Layer) -> None:
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    with torch.inference_mode():
        grids = read_encoder(weights, "RN50", layer).double()(images)

    expected = clip_reference.encode({name: tensor.double() for name, tensor in state.items()}, images)[layer]
    torch.testing.assert_close(grids, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", get_args(ClipResNet))
def test_grids_equal_those_of_open_clip(architecture: ClipResNet) -> None:
    modified_resnet = pytest.importorskip("open_clip.modified_resnet", reason="open_clip_torch is not installed")
    width = num_channels(architecture, "layer4") // 32
    reference = modified_resnet.ModifiedResNet(list(OPEN_CLIP_LAYERS[architecture]), 8, 2, 64, width).eval().double()
    state = random_state(architecture)
    assert set(state) == {name for name in reference.state_dict() if not name.startswith("attnpool.")}
    reference.load_state_dict(state, strict=False)
    encoder = GridEncoder(architecture, "layer4").eval().double()
    encoder.load_state_dict(state)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    with torch.inference_mode():
        expected = reference.layer4(reference.layer3(reference.layer2(reference.layer1(reference.stem(images)))))
        torch.testing.assert_close(encoder(images), expected, rtol=1e-10, atol=1e-10)


def test_images_are_normalized_as_clip_does(state, weights) -> None:
    images = random_images(2)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073))
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711))
    normalized = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = clip_reference.encode(state, normalized)["layer3"].flatten(2).transpose(1, 2).numpy()

    network = optimize_for_inference(read_encoder(weights, "RN50", "layer3"), "float32", False, CPU)

    assert relative_error(encode_grids(network, images), expected) < 1e-3  # of rounding to float16


def test_bfloat16_grids_are_close_to_float32(weights) -> None:
    encoder = read_encoder(weights, "RN50", "layer3")
    float32, bfloat16 = (
        encode_grids(optimize_for_inference(encoder, precision, False, CPU), random_images(2)).astype(float)
        for precision in ("float32", "bfloat16")
    )

    assert 0 < relative_error(bfloat16, float32) < 0.03


def test_int8_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16 with RN50"):
        encode_params("weights.safetensors", architecture="RN50", precision="int8")


def test_the_digest_does_not_depend_on_the_form(state, weights, tmp_path) -> None:
    torch.save({"state_dict": {f"module.visual.{name}": tensor for name, tensor in state.items()}}, tmp_path / "a.pt")
    save_file(state, tmp_path / "bare.safetensors")

    digests = {
        weights_digest(load_encoder(encode_params(path, architecture="RN50")))
        for path in (weights, tmp_path / "a.pt", tmp_path / "bare.safetensors")
    }

    assert len(digests) == 1


def test_weights_of_torchvision_do_not_match(tmp_path) -> None:
    with torch.random.fork_rng():
        save_file(GridEncoder("resnet50", "layer2").state_dict(), tmp_path / "resnet50.safetensors")

    with pytest.raises(UserError, match=r"does not match RN50 up to layer2\. Missing tensors: .*bn2") as error:
        read_encoder(tmp_path / "resnet50.safetensors", "RN50", "layer2")
    assert "encode.architecture" in str(error.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.trace
def test_a_torchscript_archive_is_refused_and_the_documented_command_converts_it(state, weights, tmp_path) -> None:
    """OpenAI's files are TorchScript archives."""

    class Clip(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = GridEncoder("RN50", "layer2")
            self.visual.load_state_dict({name: state[name] for name in self.visual.state_dict()})

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.visual(images)

    archive = tmp_path / "RN50.pt"
    torch.jit.trace(Clip().eval(), torch.zeros(1, 3, 32, 32)).save(str(archive))
    with pytest.raises(UserError, match=r"RN50\.pt: a TorchScript archive, which holds code\. Convert it"):
        read_encoder(archive, "RN50", "layer2")
    (program,) = re.findall(r"python -c \"\n(.*?)\"\n", (ROOT / "docs/encoding.md").read_text(), re.DOTALL)

    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True, timeout=120)

    converted = read_encoder(tmp_path / "RN50.safetensors", "RN50", "layer2")
    assert weights_digest(converted) == weights_digest(read_encoder(weights, "RN50", "layer2"))


def test_a_download_names_the_page_with_the_files(tmp_path) -> None:
    with pytest.raises(UserError, match=r"RN50x4: .*docs/encoding\.md"):
        download_weights("RN50x4", tmp_path)
    page = (ROOT / "docs/encoding.md").read_text()
    assert all(f"`{architecture}`" in page for architecture in get_args(ClipResNet))
