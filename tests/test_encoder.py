import hashlib
import pickle
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.features.encoder import (
    EncodeParams,
    GridEncoder,
    encode_grids,
    fetch_weights,
    for_inference,
    load_encoder,
    weights_digest,
)
from pipeline.features.quantization.quantized_encoder import multiplies_exactly
from pipeline.params import load
from tests.factories import encode_params

REAL = Path(__file__).parents[2] / "shared" / "real"


def params(weights: Path | str, **changes: object) -> EncodeParams:
    return encode_params(weights, **({"layer": "layer2", "image_size": 64} | changes))


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torchvision.models.resnet18(weights=None).eval()


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


def test_the_cut_resnet_computes_what_torchvisions_does(resnet, weights):
    encoder = load_encoder(params(weights, layer="layer4"))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    with torch.inference_mode():
        torch.testing.assert_close(resnet.fc(encoder(images).mean((2, 3))), resnet(images))
    assert set(encoder.state_dict()) == {name for name in resnet.state_dict() if not name.startswith("fc")}


def test_the_encoder_is_frozen(weights):
    encoder = load_encoder(params(weights))

    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_loading_draws_no_random_numbers(weights):
    before = torch.random.get_rng_state()

    load_encoder(params(weights))

    assert torch.equal(torch.random.get_rng_state(), before)


def test_equal_weights_have_one_digest_in_every_container(resnet, weights, tmp_path):
    state = resnet.state_dict()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "nested.pt")
    kept = {n: t for n, t in state.items() if n.startswith(("conv1", "bn1", "layer1", "layer2"))}
    uncaptioned_images = {name: tensor for name, tensor in kept.items() if not name.endswith("num_batches_tracked")}
    torch.save(uncaptioned_images, tmp_path / "bare.pth")

    containers = [weights, tmp_path / "plain.pth", tmp_path / "nested.pt", tmp_path / "bare.pth"]
    digests = {weights_digest(load_encoder(params(path))) for path in containers}

    assert len(digests) == 1
    assert weights_digest(load_encoder(params(weights, layer="layer3"))) not in digests


def test_half_precision_weights_are_computed_in_single(resnet, tmp_path):
    save_file({name: tensor.half() for name, tensor in resnet.state_dict().items()}, tmp_path / "half.safetensors")

    encoder = load_encoder(params(tmp_path / "half.safetensors"))

    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert torch.equal(encoder.conv1.weight, resnet.conv1.weight.half().float())


def test_the_digest_sees_one_changed_value(resnet, weights, tmp_path):
    state = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    state["layer2.1.bn2.running_mean"][5] += 1e-3
    save_file(state, tmp_path / "other.safetensors")

    digests = [weights_digest(load_encoder(params(path))) for path in (weights, tmp_path / "other.safetensors")]

    assert digests[0] != digests[1]


def test_weights_that_do_not_fit_are_refused_by_name(resnet, tmp_path):
    state = dict(resnet.state_dict())
    del state["layer2.0.bn1.running_var"]
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    path = tmp_path / "odd.safetensors"
    save_file(state, path)

    with pytest.raises(UserError) as error:
        load_encoder(params(path))

    assert str(error.value) == (
        f"{path}: does not fit resnet18 up to layer2: lacks layer2.0.bn1.running_var; has other shapes for"
        " conv1.weight ([64, 1, 7, 7], not [64, 3, 7, 7]); mend encode.weights, encode.architecture or"
        " encode.layer in params.yaml"
    )


def test_weights_of_a_shallower_cut_lack_the_next_layer(resnet, tmp_path):
    path = tmp_path / "to-layer2.safetensors"
    save_file({n: t for n, t in resnet.state_dict().items() if not n.startswith(("layer3", "layer4", "fc"))}, path)

    with pytest.raises(UserError, match=r"lacks layer3\.0\.conv1\.weight, .* and \d+ more"):
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
        with pytest.raises(UserError, match=r"(evil|raw)\.pth?: holds more than tensors"):
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
def test_what_is_no_weights_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(UserError, match=rf"{name}: is no weights file"):
        load_encoder(params(tmp_path / name))


def test_a_file_without_names_is_no_state_dict(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")

    with pytest.raises(UserError, match=r"list\.pth: is no state dict"):
        load_encoder(params(tmp_path / "list.pth"))


def test_a_missing_file_and_an_unknown_name_are_told(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth: no such file; mend encode\.weights"):
        load_encoder(params(tmp_path / "none.pth"))
    with pytest.raises(UserError, match=r"no 'IMAGENET1K_V2' for resnet18; use IMAGENET1K_V1"):
        load_encoder(params("IMAGENET1K_V2"))


def test_image_size_is_a_multiple_of_the_layers_stride(tmp_path):
    params_section = (
        "encode: {architecture: resnet18, layer: layer3, weights: a, image_size: 200, precision: float32,"
        " compile: false, views: [whole]}"
    )
    (tmp_path / "params.yaml").write_text(params_section)

    with pytest.raises(UserError, match="image_size must be a multiple of 16 with layer3, got 200"):
        load(tmp_path / "params.yaml", "encode", EncodeParams)


def test_regions_go_by_rows(weights):
    encoder = load_encoder(params(weights))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    pictures[1] = pictures[0]
    pictures[1, 40:48, 16:24] = 0

    grids = encode_grids(encoder, pictures).reshape(2, 8, 8, 128)

    assert grids.dtype == np.float16
    change = np.abs(grids[0].astype(float) - grids[1].astype(float)).sum(-1)
    assert np.unravel_index(change.argmax(), change.shape) == (5, 2)


def test_bfloat16_is_near_float32_and_not_equal(weights):
    encoder = load_encoder(params(weights))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)

    cpu = torch.device("cpu")
    exact, rough = (
        encode_grids(for_inference(encoder, kind, False, cpu), pictures).astype(float)
        for kind in ("float32", "bfloat16")
    )

    assert 0 < np.abs(rough - exact).mean() < 0.02 * np.abs(exact).mean()


def test_the_faster_network_computes_the_same(weights):
    encoder = load_encoder(params(weights))
    # Statistics as of a trained network: a fold that forgets one of them shows.
    for norm in (module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.uniform_(-0.2, 0.2)
    before = weights_digest(encoder)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)

    network = for_inference(encoder, "float32", False, torch.device("cpu"))

    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    np.testing.assert_allclose(
        encode_grids(network, pictures).astype(float),
        encode_grids(encoder, pictures).astype(float),
        atol=2e-3,
        rtol=2e-3,
    )
    assert weights_digest(encoder) == before


@pytest.mark.skipif(shutil.which("g++") is None, reason="compilation needs g++")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_the_compiled_network_computes_the_same(weights, precision, tolerance):
    encoder = load_encoder(params(weights))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)

    plain, compiled = (
        encode_grids(for_inference(encoder, precision, compiled, torch.device("cpu")), pictures).astype(float)
        for compiled in (False, True)
    )

    assert np.abs(compiled - plain).mean() < tolerance * np.abs(plain).mean()


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="processors tell their instructions on Linux alone")
def test_a_processor_with_vnni_instructions_takes_int8():
    """Tests of int8 skip where it cannot be had, so something must tell that it is had here."""
    if "vnni" in Path("/proc/cpuinfo").read_text():
        assert multiplies_exactly()


def test_without_a_compiler_the_param_is_named(weights, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"encode\.compile needs the C\+\+ compiler"):
        for_inference(load_encoder(params(weights)), "float32", True, torch.device("cpu"))


def test_features_beyond_float16_are_an_error(resnet, tmp_path):
    state = dict(resnet.state_dict())
    state["layer2.1.bn2.weight"] = torch.full((128,), 1e9)
    save_file(state, tmp_path / "huge.safetensors")
    encoder = load_encoder(params(tmp_path / "huge.safetensors"))
    pictures = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)

    with pytest.raises(UserError, match="beyond float16"):
        encode_grids(encoder, pictures)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_weights_are_downloaded_once(weights, checkpoints):
    file = weights.read_bytes()
    name = f"resnet18-{hashlib.sha256(file).hexdigest()[:8]}.safetensors"
    weights.rename(weights.with_name(name))

    with served(weights.parent) as address:
        first = fetch_weights(f"{address}/{name}")
    second = fetch_weights(f"{address}/{name}")

    assert first == second == checkpoints / name
    assert first.read_bytes() == file
    assert list(checkpoints.iterdir()) == [first]


def test_a_torchvision_name_means_the_cached_file(resnet, checkpoints):
    checkpoints.mkdir(parents=True)
    name = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    torch.save(resnet.state_dict(), checkpoints / name)

    assert torch.equal(load_encoder(params("IMAGENET1K_V1")).conv1.weight, resnet.conv1.weight)


def test_a_download_that_is_not_the_file_named_leaves_nothing(weights, checkpoints):
    weights.rename(weights.with_name("resnet18-00000000.pth"))

    with served(weights.parent) as address, pytest.raises(UserError, match="invalid hash"):
        fetch_weights(f"{address}/resnet18-00000000.pth")

    assert list(checkpoints.iterdir()) == []


def test_weights_out_of_reach_are_told_with_their_place(tmp_path, checkpoints):
    with served(tmp_path) as address:
        pass

    with pytest.raises(UserError) as error:
        fetch_weights(f"{address}/resnet18-f37072fd.pth")

    place = checkpoints / "resnet18-f37072fd.pth"
    assert str(error.value).startswith(f"{place}: no such file, and it cannot be downloaded")
    assert "put resnet18-f37072fd.pth there, or set encode.weights in params.yaml" in str(error.value)
    assert list(checkpoints.iterdir()) == []


@pytest.mark.skipif(not REAL.is_dir(), reason="the real weights of ../shared/real are absent")
def test_real_weights_load():
    path = REAL / "weights" / "resnet18-imagenet-to-layer3.pth"

    encoder = load_encoder(params(path, layer="layer3", image_size=224))

    assert encoder.channels == 256
    with pytest.raises(UserError, match=r"up to layer4: lacks layer4\.0\.conv1\.weight"):
        load_encoder(params(path, layer="layer4", image_size=224))
