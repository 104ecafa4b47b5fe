"""The frozen image encoder: a torchvision ResNet, cut after one of its layers.

B images, S side of the picture in px, C channels, H and W grid height and width, P = H * W regions, by rows.
"""

import copy
import hashlib
import os
import pickle
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.errors import UserError
from pipeline.features.images import Pixels, View, normalize
from pipeline.features.quantization.quantized_encoder import QuantizedEncoder
from pipeline.params import params_section

Architecture = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Layer = Literal["layer2", "layer3", "layer4"]
Precision = Literal["float32", "bfloat16", "int8"]

# Fixed, and the last batch filled up, since convolutions may round otherwise for another batch size.
IMAGES_PER_BATCH = 16

STRIDES: dict[Layer, int] = {"layer2": 8, "layer3": 16, "layer4": 32}


@params_section
class EncodeParams:
    """Section `encode`: what the frozen encoder is and how it sees a picture."""

    architecture: Architecture
    """ResNet of torchvision; the deeper, the better and the slower."""
    layer: Layer
    """Last layer kept; its grid has a cell every 8, 16 or 32 px (layer2, layer3, layer4)."""
    weights: str
    """torchvision's name of a set of weights, such as `IMAGENET1K_V2`, or a path that ends in .safetensors,
    .pth or .pt."""
    image_size: int
    """Side in px of the square that the whole picture is resized to; a multiple of the layer's 8, 16 or
    32 px, so that grid cells map linearly on the picture."""
    precision: Precision
    """Arithmetic inside the ResNet; bfloat16 is faster and less exact, int8, which never runs on a GPU, still
    faster and still less exact. Grids are float16 in any."""
    compile: bool
    """Whether PyTorch compiles the ResNet: faster after a start of half a minute, and rounds otherwise."""
    views: tuple[View, ...]
    """What is stored of each picture: `whole`, parts of 7/8 of its sides such as `top_left` or `center`, and
    these mirrored, such as `whole_flipped`. Captions are generated from the first."""

    def __post_init__(self) -> None:
        if not self.views or len(set(self.views)) < len(self.views):
            raise ValueError(f"views must name at least one view, and none twice, got {list(self.views)}")
        stride = STRIDES[self.layer]
        if self.image_size < stride or self.image_size % stride:
            raise ValueError(f"image_size must be a multiple of {stride} with {self.layer}, got {self.image_size}")
        if self.precision == "int8" and self.compile:
            raise ValueError("compile must be false with precision int8, which PyTorch does not compile")


class GridEncoder(nn.Module):
    """A ResNet up to and with `layer`: pictures [B, 3, S, S], normalized, to grids [B, C, H, W].

    Its parameters have torchvision's names. He et al. 2016, Deep Residual Learning for Image Recognition.
    """

    def __init__(self, architecture: Architecture, layer: Layer) -> None:
        super().__init__()
        for name, child in torchvision.models.get_model(architecture, weights=None).named_children():
            self.add_module(name, child)
            if name == layer:
                break

    @property
    def channels(self) -> int:
        """C."""
        return [child for child in self.modules() if isinstance(child, nn.BatchNorm2d)][-1].num_features

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized pictures [B, 3, S, S] to grids [B, C, H, W]."""
        for child in self.children():
            images = child(images)
        return images


def load_encoder(params: EncodeParams) -> GridEncoder:
    """Build the encoder that `encode` describes, frozen, in eval mode, channels last, on the CPU.

    Raises `UserError`, naming file and tensors, where the weights are missing, unreachable, damaged, or do
    not cover the layers kept; tensors of other layers are ignored.
    """
    return read_encoder(_weights_path(params), params.architecture, params.layer)


def read_encoder(path: Path, architecture: Architecture, layer: Layer) -> GridEncoder:
    """Build the encoder whose weights a file holds, as `load_encoder` does. Raises `UserError` as that does."""
    # On `meta` nothing is filled with random numbers only to be replaced.
    with torch.device("meta"):
        encoder = GridEncoder(architecture, layer)
    encoder.load_state_dict(_matching(read_weights(path), encoder, path, f"{architecture} up to {layer}"), assign=True)
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return encoder.eval().requires_grad_(False)


def weights_digest(encoder: GridEncoder) -> str:
    """SHA-256 over names, shapes and float32 values, in hexadecimal: the same whatever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_weighing(encoder).items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def for_inference(encoder: GridEncoder, precision: Precision, compiled: bool, device: torch.device) -> nn.Module:
    """Copy a frozen encoder to a device as a network that computes the same faster, to rounding.

    Each batch norm is folded into the convolution before it. In int8 it stays on the CPU. Raises `UserError` where a
    compiled one, or one in int8, cannot be had.
    """
    if precision == "int8":
        return QuantizedEncoder(encoder)
    network = _folded(copy.deepcopy(encoder)).to(device, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not compiled:
        return network
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("encode.compile needs the C++ compiler g++; install it or set encode.compile to false")
    return cast(nn.Module, torch.compile(network, dynamic=False, options={"freezing": device.type == "cpu"}))


def runs_on_cpu(precision: Precision, device: torch.device) -> bool:
    """Whether a network that `for_inference` made for a device is on the CPU."""
    return device.type == "cpu" or precision == "int8"


@torch.inference_mode()
def encode_grids(network: nn.Module, pictures: Pixels) -> npt.NDArray[np.float16]:
    """Encode pictures, uint8 [B, S, S, 3], to grids, float16 [B, P, C], on the network's device, in its precision.

    Raises `UserError` where a value is NaN or beyond float16, which only foreign weights bring about.
    """
    pixels = torch.from_numpy(pictures)
    if isinstance(network, QuantizedEncoder):
        grids = network(pixels)  # [B, C, H, W]
    else:
        weight = next(network.parameters())
        grids = network(normalize(pixels.to(weight.device)).to(weight.dtype))  # [B, C, H, W]
    regions = grids.flatten(2).transpose(1, 2)  # [B, P, C]
    if not torch.stack(regions.aminmax()).half().isfinite().all():
        raise UserError("encode.weights give features that are NaN or beyond float16; use other weights")
    return np.asarray(regions.half().contiguous().cpu().numpy(), dtype=np.float16)


def encode_batch(network: nn.Module, pictures: Pixels, size: int = IMAGES_PER_BATCH) -> npt.NDArray[np.float16]:
    """Encode at most `size` pictures, uint8 [B, S, S, 3], as a batch of just that size; otherwise as `encode_grids`."""
    batch = np.zeros((size, *pictures.shape[1:]), dtype=np.uint8)
    batch[: len(pictures)] = pictures
    return encode_grids(network, batch)[: len(pictures)]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors, .pth or .pt file; nothing in it can run code.

    Raises `UserError`, naming the file, where it is missing, damaged or holds anything but tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; mend encode.weights in params.yaml")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors, or is damaged, and is not loaded, since such a file can run"
            " code; save a plain state dict as .safetensors"
        ) from error
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path}: is no weights file, or is damaged; fetch it again") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: is no state dict (names with tensors); save the encoder's `state_dict()`")
    return content


def cached_weights(url: str) -> Path:
    """Path in PyTorch's hub cache of the weights file that lies at `url`, whether it is there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def fetch_weights(url: str) -> Path:
    """Give the path of a weights file in PyTorch's hub cache, downloaded from `url` where it is not there.

    Raises `UserError`, saying where to put the file, where it cannot be downloaded whole.
    """
    path = cached_weights(url)
    name = path.name
    if path.is_file():
        return path
    digest = re.search(r"-([0-9a-f]{8,})\.", name)  # torchvision's names end in a part of the SHA-256
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=False)
    except Exception as error:  # The network fails in many ways, and none leaves the file.
        raise UserError(
            f"{path}: no such file, and it cannot be downloaded ({error}); put {name} there, or set"
            " encode.weights in params.yaml to a path that ends in .safetensors or .pth"
        ) from error
    return path


def _weights_path(params: EncodeParams) -> Path:
    if params.weights.endswith((".safetensors", ".pth", ".pt")):
        return Path(params.weights)
    known = torchvision.models.get_model_weights(params.architecture)
    if params.weights not in known.__members__:
        raise UserError(
            f"encode.weights: torchvision has no {params.weights!r} for {params.architecture}; use"
            f" {' or '.join(known.__members__)}, or a path that ends in .safetensors, .pth or .pt"
        )
    return fetch_weights(known[params.weights].url)


def _matching(found: dict[str, Tensor], encoder: GridEncoder, path: Path, described: str) -> dict[str, Tensor]:
    wanted = _weighing(encoder)
    missing = [name for name in wanted if name not in found]
    misshapen = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    if missing or misshapen:
        faults = [f"lacks {_listed(missing)}"] if missing else []
        if misshapen:
            first = misshapen[0]
            faults.append(
                f"has other shapes for {_listed(misshapen)}"
                f" ({list(found[first].shape)}, not {list(wanted[first].shape)})"
            )
        raise UserError(
            f"{path}: does not fit {described}: {'; '.join(faults)}; mend"
            " encode.weights, encode.architecture or encode.layer in params.yaml"
        )
    # Batch norm's counter matters to training alone, and converters leave it out.
    counters = {name: torch.zeros((), dtype=torch.long) for name in encoder.state_dict() if name not in wanted}
    return {name: found[name].float() for name in wanted} | counters


def _folded(module: nn.Module) -> nn.Module:
    """Fold the batch norms of a module in eval mode, and of all its children, into the convolutions before them."""
    children = list(module.named_children())
    for (place, before), (name, child) in pairwise(children):
        if isinstance(before, nn.Conv2d) and isinstance(child, nn.BatchNorm2d):
            setattr(module, place, fuse_conv_bn_eval(before, child))
            setattr(module, name, nn.Identity())
    for _, child in children:
        _folded(child)
    return module


def _weighing(encoder: GridEncoder) -> dict[str, Tensor]:
    return {n: tensor for n, tensor in encoder.state_dict().items() if not n.endswith("num_batches_tracked")}


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
