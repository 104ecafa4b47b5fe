import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from benchmarks.encoding import relative_error
from pipeline.errors import UserError
from pipeline.features.encoder import (
    EncodeParams,
    GridEncoder,
    encode_batch,
    encode_grids,
    load_encoder,
    optimize_for_inference,
    weights_digest,
)
from pipeline.features.quantization.quantized_encoder import supports_int8
from pipeline.features.resnets import Normalization
from pipeline.params import load
from tests import clip_reference
from tests.factories import encode_params
from tests.paths import REAL, ROOT

CPU = torch.device("cpu")


def params(weights: Path | str, **changes: object) -> EncodeParams:
    return encode_params(weights, **({"layer": "layer2", "image_size": 64} | changes))


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torchvision.models.resnet18(weights=None).eval()


def random_images(num_images: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_images, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def weights(resnet, tmp_path) -> Path:
    path = tmp_path / "resnet18.safetensors"
    save_file(resnet.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("architecture", "layer", "shape"),
    [
        ("resnet18", "layer2", (128, 8, 8)),
        ("resnet18", "layer3", (256, 4, 4)),
        ("resnet34", "layer4", (512, 2, 2)),
        ("resnet50", "layer2", (512, 8, 8)),
        ("resnet50", "layer4", (2048, 2, 2)),
        ("resnet101", "layer3", (1024, 4, 4)),
        ("resnet152", "layer4", (2048, 2, 2)),
    ],
)
def test_grids_have_the_shape_of_the_layer(architecture, layer, shape):
    with torch.device("meta"):
        encoder = GridEncoder(architecture, layer)
        grids = encoder(torch.empty(2, 3, 64, 64))

    assert grids.shape == (2, *shape)
    assert encoder.channels == shape[0]


def test_the_encoder_is_frozen_and_channels_last(weights):
    encoder = load_encoder(params(weights))

    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_loading_draws_no_random_numbers(weights):
    before = torch.random.get_rng_state()

    load_encoder(params(weights))

    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_digest_does_not_depend_on_the_file_format(resnet, weights, tmp_path):
    state = resnet.state_dict()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "nested.pt")
    to_layer2 = {n: t for n, t in state.items() if n.startswith(("conv1", "bn1", "layer1", "layer2"))}
    without_counters = {name: tensor for name, tensor in to_layer2.items() if not name.endswith("num_batches_tracked")}
    torch.save(without_counters, tmp_path / "minimal.pth")

    paths = [weights, tmp_path / "plain.pth", tmp_path / "nested.pt", tmp_path / "minimal.pth"]
    digests = {weights_digest(load_encoder(params(path))) for path in paths}

    assert len(digests) == 1
    assert weights_digest(load_encoder(params(weights, layer="layer3"))) not in digests


def test_float16_weights_are_converted_to_float32(resnet, tmp_path):
    save_file({name: tensor.half() for name, tensor in resnet.state_dict().items()}, tmp_path / "half.safetensors")

    encoder = load_encoder(params(tmp_path / "half.safetensors"))

    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.conv1.weight, resnet.conv1.weight.half().float())


def test_one_changed_value_changes_the_digest(resnet, weights, tmp_path):
    state = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    state["layer2.1.bn2.running_mean"][5] += 1e-3
    save_file(state, tmp_path / "other.safetensors")

    digests = [weights_digest(load_encoder(params(path))) for path in (weights, tmp_path / "other.safetensors")]

    assert digests[0] != digests[1]


def test_weights_that_do_not_match_name_the_tensors(resnet, tmp_path):
    state = dict(resnet.state_dict())
    del state["layer2.0.bn1.running_var"]
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    path = tmp_path / "odd.safetensors"
    save_file(state, path)

    with pytest.raises(UserError) as error:
        load_encoder(params(path))

    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "resnet18 up to layer2" in message
    assert "Missing tensors: layer2.0.bn1.running_var." in message
    assert "conv1.weight [64, 1, 7, 7], expected [64, 3, 7, 7]" in message


def test_weights_of_a_shallower_encoder_lack_the_next_layer(resnet, tmp_path):
    path = tmp_path / "to-layer2.safetensors"
    save_file({n: t for n, t in resnet.state_dict().items() if not n.startswith(("layer3", "layer4", "fc"))}, path)

    with pytest.raises(UserError, match=r"layer3\.0\.conv1\.weight; .* and \d+ more"):
        load_encoder(params(path, layer="layer3"))


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return subprocess.call, (["touch", str(self.target)],)


def test_code_in_a_weights_file_never_runs(tmp_path):
    path, touched = tmp_path / "evil.pth", tmp_path / "touched"
    torch.save({"conv1.weight": Exploit(touched)}, path)
    raw = tmp_path / "raw.pt"
    raw.write_bytes(pickle.dumps({"conv1.weight": Exploit(touched)}, protocol=2))

    for file in (path, raw):
        with pytest.raises(UserError, match=r"(evil|raw)\.pth?: holds objects other than tensors"):
            load_encoder(params(file))

    assert not touched.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.safetensors", b""),
        ("a.safetensors", b"x" * 99),
        ("a.pth", b""),
        ("a.pth", b"PK\x03\x04 and no more"),
    ],
)
def test_a_file_that_holds_no_weights_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(UserError, match=rf"{name}: not a weights file"):
        load_encoder(params(tmp_path / name))


def test_a_list_of_tensors_is_not_a_state_dict(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")

    with pytest.raises(UserError, match=r"list\.pth: not a state dict.*type list"):
        load_encoder(params(tmp_path / "list.pth"))


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        ([], "module."),
        ([], "backbone."),
        ([], "encoder."),
        ([], "visual.trunk."),
        (["state_dict"], "module."),
        (["state_dict"], "model.backbone."),
        (["model"], ""),
        (["model"], "_orig_mod."),
        (["model_state_dict"], "encoder."),
        (["checkpoint", "model"], "module.backbone."),
    ],
)
def test_weights_in_a_checkpoint_are_found(resnet, weights, tmp_path, keys, prefix):
    content = {f"{prefix}{name}": tensor for name, tensor in resnet.state_dict().items()} | {"head.bias": torch.ones(3)}
    for key in keys:
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "lr": 0.1}}
    torch.save(content, tmp_path / "checkpoint.pth")

    encoder = load_encoder(params(tmp_path / "checkpoint.pth"))

    assert weights_digest(encoder) == weights_digest(load_encoder(params(weights)))


def test_a_prefix_in_safetensors_is_removed(resnet, weights, tmp_path):
    save_file({f"backbone.{name}": tensor for name, tensor in resnet.state_dict().items()}, tmp_path / "a.safetensors")

    encoder = load_encoder(params(tmp_path / "a.safetensors"))

    assert weights_digest(encoder) == weights_digest(load_encoder(params(weights)))


def test_the_model_of_a_checkpoint_is_preferred_to_its_average(resnet, weights, tmp_path):
    state = resnet.state_dict()
    average = {f"module.{name}": tensor + 1 for name, tensor in state.items()}
    torch.save({"model_ema": average, "model": state}, tmp_path / "checkpoint.pth")

    encoder = load_encoder(params(tmp_path / "checkpoint.pth"))

    assert weights_digest(encoder) == weights_digest(load_encoder(params(weights)))


def test_a_file_with_other_content_is_an_error_that_describes_it(resnet, tmp_path):
    state = {name: tensor for name, tensor in resnet.state_dict().items() if not name.startswith(("layer4", "fc"))}
    cyclic: dict[str, object] = {}
    cyclic["a"] = cyclic
    for content, facts in (
        ({"epoch": 3, "lr": 0.1}, ["not a state dict", "epoch; lr"]),
        ({}, ["not a state dict", "empty dict"]),
        (cyclic, ["not a state dict", "keys a"]),
        (torch.zeros(3), ["not a state dict", "Tensor"]),
        ({"vit.patch.weight": torch.zeros(3), "vit.norm": torch.zeros(3)}, ["2 tensors", "vit.patch.weight; vit.norm"]),
        ({f"{who}.{n}": t for who in ("student", "teacher") for n, t in state.items()}, ["student., teacher."]),
        ({"conv1.weight": torch.zeros(3, device="meta")}, ["not a state dict", "conv1.weight"]),
    ):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(UserError) as error:
            load_encoder(params(tmp_path / "a.pth"))
        message = str(error.value)
        assert message.startswith(f"{tmp_path / 'a.pth'}: ")
        assert all(fact in message for fact in facts), message
        assert "\n" not in message


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth: no such file.*gridcap download"):
        load_encoder(params(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("key", "value", "facts"),
    [
        ("image_size", "200", ["multiple of 16", "layer3", "200"]),
        ("image_size", "{height: 208, width: 200}", ["multiple of 16", "layer3", "got 200"]),
        ("image_size", "{height: 208}", ["encode.image_size.width is missing"]),
        ("image_size", "large", ["encode.image_size must be a valid integer"]),
        ("image_size", "4096", ["encode.image_size must be less than or equal to 2048"]),
        ("pool", "{height: 13, width: 14}", ["pool must be at most 13 x 13", "layer3", "got 13 x 14"]),
        ("pool", "7", ["encode.pool must be a mapping"]),
        ("resize", "crop", ["encode.resize", "center_crop"]),
        ("weights", "IMAGENET1K_V2", ["IMAGENET1K_V2", ".safetensors", "gridcap download weights:resnet50"]),
        ("views", "[]", ["views"]),
        ("views", "[whole, whole]", ["views", "whole"]),
        ("precision", "float16", ["encode.precision", "float16"]),
    ],
)
def test_invalid_params_are_an_error(tmp_path, key, value, facts):
    values = {
        "architecture": "resnet18",
        "layer": "layer3",
        "weights": "a.pth",
        "image_size": "208",
        "resize": "squash",
        "pool": "null",
        "precision": "float32",
        "compile": "false",
        "views": "[whole]",
    }
    lines = [f"  {name}: {text}\n" for name, text in (values | {key: value}).items()]
    (tmp_path / "params.yaml").write_text("encode:\n" + "".join(lines))

    with pytest.raises(UserError) as error:
        load(tmp_path / "params.yaml", "encode", EncodeParams)

    assert all(fact in str(error.value) for fact in [str(tmp_path / "params.yaml"), *facts])


def test_int8_cannot_be_compiled():
    with pytest.raises(ValueError, match="compile must be false with precision int8"):
        params("weights.pth", precision="int8", compile=True)


def test_regions_are_in_row_major_order(weights):
    encoder = load_encoder(params(weights))
    images = random_images(2)
    images[1] = images[0]
    images[1, 40:48, 16:24] = 0

    grids = encode_grids(encoder, images).reshape(2, 8, 8, 128)

    assert grids.dtype == np.float16
    change = np.abs(grids[0].astype(float) - grids[1].astype(float)).sum(-1)
    assert np.unravel_index(change.argmax(), change.shape) == (5, 2)


def test_bfloat16_is_close_to_float32(weights):
    encoder = load_encoder(params(weights))
    images = random_images(2)

    float32, bfloat16 = (
        encode_grids(optimize_for_inference(encoder, precision, False, CPU), images).astype(float)
        for precision in ("float32", "bfloat16")
    )

    assert 0 < np.abs(bfloat16 - float32).mean() < 0.02 * np.abs(float32).mean()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "RN50"])
def test_bfloat16_is_within_the_bound_of_the_page_for_every_family(architecture):
    with torch.device("meta"):
        encoder = GridEncoder(architecture, "layer4")
    weights = clip_reference.random_weights(encoder)
    # Features of deep networks would grow from block to block.
    scaled = {name: 0.3 * weight if name.endswith("bn3.weight") else weight for name, weight in weights.items()}
    encoder.load_state_dict(scaled, assign=True)
    encoder.eval().requires_grad_(False)

    float32, bfloat16 = (
        encode_grids(optimize_for_inference(encoder, precision, False, CPU), random_images(2))
        for precision in ("float32", "bfloat16")
    )

    assert 0 < relative_error(bfloat16, float32) < 0.02
    assert "at most 0.02" in (ROOT / "docs/encoding.md").read_text()


def test_folding_batch_norms_keeps_the_grids(weights):
    encoder = load_encoder(params(weights))
    # With random statistics, each of them changes the result.
    for norm in (module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.uniform_(-0.2, 0.2)
    before = weights_digest(encoder)
    images = random_images(2)

    network = optimize_for_inference(encoder, "float32", False, CPU)

    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    np.testing.assert_allclose(
        encode_grids(network, images).astype(float),
        encode_grids(encoder, images).astype(float),
        atol=2e-3,
        rtol=2e-3,
    )
    assert weights_digest(encoder) == before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compilation needs g++")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_compiling_keeps_the_grids(weights, precision, tolerance):
    encoder = load_encoder(params(weights))
    images = random_images(2)

    eager, compiled = (
        encode_grids(optimize_for_inference(encoder, precision, compiled, CPU), images).astype(float)
        for compiled in (False, True)
    )

    assert np.abs(compiled - eager).mean() < tolerance * np.abs(eager).mean()


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs /proc/cpuinfo")
def test_a_cpu_with_vnni_supports_int8():
    """Tests of int8 are skipped where `supports_int8` is false, so check that it is true with VNNI."""
    if "vnni" in Path("/proc/cpuinfo").read_text():
        assert supports_int8()


def test_compile_without_a_compiler_is_an_error(weights, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"encode\.compile: .*C\+\+ compiler"):
        optimize_for_inference(load_encoder(params(weights)), "float32", True, CPU)


def test_features_outside_the_range_of_float16_are_an_error(resnet, tmp_path):
    state = dict(resnet.state_dict())
    state["layer2.1.bn2.weight"] = torch.full((128,), 1e9)
    save_file(state, tmp_path / "huge.safetensors")
    encoder = load_encoder(params(tmp_path / "huge.safetensors"))
    images = random_images(1)

    with pytest.raises(UserError, match="range of float16"):
        encode_grids(encoder, images)


def test_padding_of_a_batch_does_not_count_as_an_image_outside_the_range():
    class Inverse(torch.nn.Module):
        """Its features are infinite for a black image."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.normalization = Normalization(mean=(0.0, 0.0, 0.0), standard_deviation=(1.0, 1.0, 1.0))
            self.pool = None

        def forward(self, images):
            return self.weight / images

    gray = np.full((1, 2, 2, 3), 51, dtype=np.uint8)

    assert np.allclose(encode_batch(Inverse(), gray), 5.0, rtol=1e-3)
    with pytest.raises(UserError, match="range of float16"):
        encode_batch(Inverse(), np.concatenate([gray, np.zeros_like(gray)]))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real weights in ../shared/real")
def test_real_weights_load():
    path = REAL / "weights" / "resnet18-imagenet-to-layer3.pth"

    encoder = load_encoder(params(path, layer="layer3", image_size=224))

    assert encoder.channels == 256
    with pytest.raises(UserError, match=r"up to layer4.*layer4\.0\.conv1\.weight"):
        load_encoder(params(path, layer="layer4", image_size=224))
