"""The frozen image encoder: a ResNet of torchvision or CLIP up to one of its layers.

Shapes: B images, Y and X height and width of the image in px, C channels, H and W height and width of the grid,
P = H * W regions in row-major order.
"""

import copy
import hashlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.cuda_graphs import GraphedFunction
from pipeline.device import to_cpu, to_device
from pipeline.errors import UserError, summarize
from pipeline.features.clip_resnets import clip_layers
from pipeline.features.fused_blocks import fuse_network
from pipeline.features.images import Pixels, normalize
from pipeline.features.quantization.quantized_encoder import QuantizedEncoder
from pipeline.features.resnets import (
    RESNETS,
    STRIDES,
    Architecture,
    ClipResNet,
    Layer,
    Normalization,
    TorchvisionResNet,
    encoder_frame,
    num_channels,
)
from pipeline.features.torchvision_resnets import torchvision_layers
from pipeline.features.views import Frame, Resize, View
from pipeline.params import DEPENDENCY, params_section

Precision = Literal["float32", "bfloat16", "int8"]

# Fixed, and smaller batches are padded: convolutions may round differently at another batch size.
IMAGES_PER_BATCH = 16

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt")

# Keys and modules that hold the encoder in checkpoints of training frameworks; _orig_mod is torch.compile's.
_WRAPPERS = frozenset(
    {
        "",
        "state_dict",
        "model_state_dict",
        "model",
        "module",
        "_orig_mod",
        "net",
        "network",
        "backbone",
        "encoder",
        "visual",
    }
)

_MAX_NESTING = 4
"""Maximum nesting of dicts in a checkpoint, which may contain itself."""


@params_section
class ImageSize:
    """Size of the encoder's input."""

    height: Annotated[int, Field(ge=8, le=2048)]
    """Height of the encoder's input, in px; a multiple of the layer's cell size."""
    width: Annotated[int, Field(ge=8, le=2048)]
    """Width of the encoder's input, in px; a multiple of the layer's cell size."""


@params_section
class GridSize:
    """Size of a grid."""

    height: Annotated[int, Field(ge=1, le=256)]
    """Rows of the stored grid."""
    width: Annotated[int, Field(ge=1, le=256)]
    """Columns of the stored grid."""


@params_section
class EncodeParams:
    """Section `encode`: the frozen encoder and its input."""

    architecture: Architecture
    """ResNet of torchvision, or of CLIP (`RN...`)."""
    layer: Layer
    """Last layer of the encoder. A grid cell covers 8 (layer2), 16 (layer3) or 32 px (layer4)."""
    weights: Annotated[Path, DEPENDENCY]
    """Weights file (.safetensors, .pth or .pt); `gridcap download weights:resnet50` fetches torchvision's."""
    image_size: Annotated[
        Annotated[int, Field(ge=8, le=2048), Tag("<integer>")] | Annotated[ImageSize, Tag("<mapping>")],
        Discriminator(lambda value: "<mapping>" if isinstance(value, dict | ImageSize) else "<integer>"),
    ]
    """Side of the square that images are resized to, in px, or {height, width}; multiples of the layer's cell size."""
    resize: Resize
    """`squash` ignores the aspect ratio of images; `center_crop` cuts off their margins as the weights' recipe does."""
    pool: GridSize | None
    """Size {height, width} that grids are reduced to by adaptive average pooling; null disables it."""
    precision: Precision
    """Arithmetic of the encoder: bfloat16 and int8 are faster and less exact; int8 runs only on CPUs with VNNI."""
    compile: bool
    """Compile the encoder with torch.compile; needs g++ on a CPU."""
    views: tuple[View, ...]
    """Crops and flips stored for each image; captions are generated from the first."""

    def __post_init__(self) -> None:
        if self.weights.suffix not in WEIGHTS_SUFFIXES:
            raise ValueError(
                f"weights must be a file that ends in {', '.join(WEIGHTS_SUFFIXES)}, got {str(self.weights)!r}."
                " `gridcap download weights:resnet50` fetches torchvision's."
            )
        if not self.views or len(set(self.views)) < len(self.views):
            raise ValueError(f"views must be at least one view, without duplicates, got {list(self.views)}")
        stride = STRIDES[self.layer]
        for side in (self.frame.height, self.frame.width):
            if side % stride or side < stride:
                raise ValueError(f"image_size must be a multiple of {stride} with {self.layer}, got {side}")
        rows, columns = self.frame.height // stride, self.frame.width // stride
        if self.pool and (self.pool.height > rows or self.pool.width > columns):
            raise ValueError(
                f"pool must be at most {rows} x {columns}, the grid of {self.layer} for this image_size, got"
                f" {self.pool.height} x {self.pool.width}"
            )
        if self.precision == "int8" and not RESNETS[self.architecture].supports_int8:
            raise ValueError(
                f"precision must be float32 or bfloat16 with {self.architecture}, which int8 does not support"
            )
        if self.precision == "int8" and self.compile:
            raise ValueError("compile must be false with precision int8, which torch.compile does not support")

    @property
    def frame(self) -> Frame:
        """Input of the encoder."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else (size.height, size.width)
        return encoder_frame(self.architecture, height, width, self.resize)

    @property
    def pooled(self) -> tuple[int, int] | None:
        """Height and width of pooled grids, or None."""
        return (self.pool.height, self.pool.width) if self.pool else None


class GridEncoder(nn.Module):
    """A ResNet up to and including one layer (He et al. 2016, Deep Residual Learning for Image Recognition).

    Its parameters have the names of torchvision or of CLIP.
    """

    def __init__(self, architecture: Architecture, layer: Layer, pool: tuple[int, int] | None = None) -> None:
        """Build the encoder with random weights.

        Args:
            architecture: Name of the ResNet.
            layer: Last layer of the encoder.
            pool: Height and width that `encode_grids` reduces grids to; None keeps those of `forward`.
        """
        super().__init__()
        self.pool = pool
        self.normalization = RESNETS[architecture].normalization
        self.channels = num_channels(architecture, layer)
        """Number of output channels, C."""
        for name, child in _named_layers(architecture):
            self.add_module(name, child)
            if name == layer:
                break

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalized images [B, 3, Y, X] as grids [B, C, H, W]."""
        for child in self.children():
            images = child(images)
        return images


def _named_layers(architecture: Architecture) -> Iterator[tuple[str, nn.Module]]:
    """Return the modules of a ResNet by name, in the order of its forward pass."""
    if architecture in get_args(ClipResNet):
        return clip_layers(cast(ClipResNet, architecture))
    return torchvision_layers(cast(TorchvisionResNet, architecture))


def load_encoder(params: EncodeParams) -> GridEncoder:
    """Load the encoder that section `encode` describes: frozen, in eval mode, channels last, on the CPU.

    Raises:
        UserError: As `read_encoder`.
    """
    return read_encoder(params.weights, params.architecture, params.layer, params.pooled)


def read_encoder(
    path: Path, architecture: Architecture, layer: Layer, pool: tuple[int, int] | None = None
) -> GridEncoder:
    """Load an encoder from a weights file: frozen, in eval mode, channels last, on the CPU.

    Args:
        path: The weights file; tensors of layers that the encoder lacks are ignored.
        architecture: Name of the ResNet.
        layer: Last layer of the encoder.
        pool: As for `GridEncoder`.

    Raises:
        UserError: The file is missing or damaged, or its tensors do not match the encoder's.
    """
    # The meta device skips the random initialization, which would be overwritten.
    with torch.device("meta"):
        encoder = GridEncoder(architecture, layer, pool)
    state_dict = _matching_tensors(read_weights(path), encoder, path, f"{architecture} up to {layer}")
    encoder.load_state_dict(state_dict, assign=True)
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return encoder.eval().requires_grad_(False)


def weights_digest(encoder: GridEncoder) -> str:
    """Return the SHA-256, in hexadecimal, of the weights' names, shapes and float32 values.

    It does not depend on the format of the weights file.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_weights(encoder).items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def optimize_for_inference(
    encoder: GridEncoder, precision: Precision, compiled: bool, device: torch.device
) -> nn.Module:
    """Make a faster copy of a frozen encoder, equal to rounding: batch norms are folded into convolutions.

    On a CPU in float32, ReLUs and additions are parts of the convolutions.

    Args:
        encoder: The encoder, which stays unchanged.
        precision: Arithmetic of the copy. With int8 it is quantized and stays on the CPU.
        compiled: Whether to compile the copy.
        device: Device of the copy, unless it is int8.

    Returns:
        A module for `encode_grids`.

    Raises:
        UserError: This machine has no C++ compiler or no int8 instructions.
    """
    if precision == "int8":
        return QuantizedEncoder(encoder)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    network = _fold_batch_norms(copy.deepcopy(encoder)).to(device, dtype)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not compiled:
        fuses = device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return fuse_network(network) if fuses else network
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("encode.compile: needs the C++ compiler g++. Install it, or set encode.compile to false.")
    network = cast(nn.Module, torch.compile(network, dynamic=False, options={"freezing": device.type == "cpu"}))
    return _GraphedEncoder(network) if device.type == "cuda" else network


class _GraphedEncoder(nn.Module):
    """A network that is replayed as a CUDA graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.pool, self.normalization = network, network.pool, network.normalization
        self._replay = GraphedFunction(network)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images; the next call overwrites the result."""
        return self._replay(images)


def runs_on_cpu(precision: Precision, device: torch.device) -> bool:
    """Whether the network that `optimize_for_inference` makes for a device runs on the CPU."""
    return device.type == "cpu" or precision == "int8"


@torch.inference_mode()
def encode_grids(network: nn.Module, images: Pixels) -> npt.NDArray[np.float16]:
    """Encode images with a network from `optimize_for_inference`.

    Args:
        network: The network.
        images: uint8 [B, Y, X, 3].

    Returns:
        Grids, float16 [B, P, C].

    Raises:
        UserError: A feature is NaN or outside the range of float16, which only unusual weights cause.
    """
    pixels = torch.from_numpy(images)
    if isinstance(network, QuantizedEncoder):
        grids = network(pixels)  # [B, C, H, W]
    else:
        weight = next(network.parameters())
        normalized = normalize(to_device(pixels, weight.device), cast(Normalization, network.normalization))
        grids = network(normalized.to(weight.dtype))  # [B, C, H, W]
    if network.pool is not None:
        grids = functional.adaptive_avg_pool2d(grids.float(), cast(tuple[int, int], network.pool))
    regions = grids.flatten(2).transpose(1, 2)  # [B, P, C]
    is_finite = torch.stack(regions.aminmax()).half().isfinite().all()
    stored = to_cpu(regions.half().contiguous())
    if not is_finite:
        raise UserError("encode.weights: features are NaN or outside the range of float16. Use other weights.")
    return np.asarray(stored.numpy(), dtype=np.float16)


def encode_batch(network: nn.Module, images: Pixels, size: int = IMAGES_PER_BATCH) -> npt.NDArray[np.float16]:
    """Encode images as one batch of fixed size.

    Args:
        network: A network from `optimize_for_inference`.
        images: uint8 [B, Y, X, 3], with B at most `size`.
        size: Batch size that the images are padded to, by repeating them.

    Returns:
        Grids, float16 [B, P, C].

    Raises:
        UserError: As `encode_grids`.
    """
    # Not by black images, whose features may be outside the range of float16 where those of photographs are not.
    batch = images.take(np.arange(size), axis=0, mode="wrap")
    return encode_grids(network, batch)[: len(images)]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a ResNet from a .safetensors, .pth or .pt file. No code in the file is run.

    Training checkpoints are searched for the ResNet: it may be nested, as under `state_dict` or `model`, and its names
    may have a prefix such as `module.` or `backbone.`, which is removed.

    Raises:
        UserError: The file is missing or damaged, holds objects other than tensors, or holds no or several ResNets.
    """
    if not os.path.isfile(path):
        raise UserError(
            f"{path}: no such file. Set encode.weights in params.yaml to a weights file, or fetch torchvision's with"
            " `gridcap download weights:ARCHITECTURE`."
        )
    try:
        if _is_torchscript(path):
            raise UserError(
                f"{path}: a TorchScript archive, which holds code. Convert it to .safetensors with the command in"
                " section Weights of docs/encoding.md."
            )
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, weights_only=True, map_location="cpu")
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds objects other than tensors, which could run code, or is damaged. Save a plain state dict as"
            " .safetensors."
        ) from error
    except Exception as error:  # torch.load raises errors of every kind for damaged files.
        raise UserError(f"{path}: not a weights file, or damaged. Download it again.") from error
    tensors = dict(_named_tensors(content))
    if not tensors:
        raise UserError(
            f"{path}: not a state dict of names and tensors, but {_describe(content)}. Save the encoder's"
            " `state_dict()`."
        )
    prefix = _resnet_prefix(tensors, path)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, such as OpenAI's weights of CLIP."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _named_tensors(content: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts, with the keys joined by dots as their names."""
    if not isinstance(content, dict) or depth > _MAX_NESTING:
        return
    for key, value in content.items():
        if not isinstance(value, Tensor):
            yield from _named_tensors(value, f"{prefix}{key}.", depth + 1)
        elif value.layout == torch.strided and not value.is_meta:
            yield f"{prefix}{key}", value


def _resnet_prefix(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Find the prefix of a ResNet's names in a file.

    A prefix of common wrappers is preferred: a checkpoint may also hold averaged weights or a teacher.

    Raises:
        UserError: The file holds no ResNet, or several of which none is preferred.
    """
    stem, block = "conv1.weight", "layer1.0.conv1.weight"
    prefixes = [name.removesuffix(stem) for name in tensors if name.endswith(stem)]
    # Without any, the tensors are compared by their full names, which lists those that are missing.
    prefixes = [prefix for prefix in prefixes if f"{prefix}{block}" in tensors and prefix[-1:] in ("", ".")]
    common = [prefix for prefix in prefixes if set(prefix.split(".")) <= _WRAPPERS]
    choices = common or prefixes
    if len(choices) == 1:
        return choices[0]
    if choices:
        raise UserError(
            f"{path}: holds several ResNets, with the prefixes {', '.join(choices)}. Save the `state_dict()` of one."
        )
    if not any(name.startswith(("conv1.", "bn1.", "layer1.")) for name in tensors):
        raise UserError(
            f"{path}: holds no ResNet with the names of torchvision or CLIP, but {len(tensors)} tensors:"
            f" {summarize(list(tensors))}. Rename them, or use other weights."
        )
    return ""


def _describe(content: object) -> str:
    """Describe what a weights file without named tensors holds."""
    if isinstance(content, dict):
        return f"a dict with the keys {summarize([str(key) for key in content])}" if content else "an empty dict"
    return f"an object of type {type(content).__name__}"


def _matching_tensors(
    state_dict: dict[str, Tensor], encoder: GridEncoder, path: Path, description: str
) -> dict[str, Tensor]:
    """Select the encoder's tensors from a state dict, as float32.

    Args:
        state_dict: Tensors by name; those that the encoder lacks are ignored.
        encoder: The encoder.
        path: File of the state dict, for error messages.
        description: Name of the encoder, for error messages.

    Raises:
        UserError: A tensor is missing or has another shape.
    """
    expected = _weights(encoder)
    missing = [name for name in expected if name not in state_dict]
    misshapen = [
        f"{name} {list(state_dict[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    if missing or misshapen:
        faults = [f"Missing tensors: {summarize(missing)}."] if missing else []
        if misshapen:
            faults.append(f"Tensors of another shape: {summarize(misshapen)}.")
        raise UserError(
            f"{path}: does not match {description}. {' '.join(faults)}"
            " Check encode.weights, encode.architecture and encode.layer in params.yaml."
        )
    # Only training uses the counters of the batch norms, and converters omit them.
    counters = {name: torch.zeros((), dtype=torch.long) for name in encoder.state_dict() if name not in expected}
    return {name: state_dict[name].float() for name in expected} | counters


def _fold_batch_norms(module: nn.Module) -> nn.Module:
    """Fold each batch norm of a module in eval mode into the convolution before it, in place and recursively."""
    children = list(module.named_children())
    for (previous_name, previous), (name, child) in pairwise(children):
        if isinstance(previous, nn.Conv2d) and isinstance(child, nn.BatchNorm2d):
            setattr(module, previous_name, fuse_conv_bn_eval(previous, child))
            setattr(module, name, nn.Identity())
    for _, child in children:
        _fold_batch_norms(child)
    return module


def _weights(encoder: GridEncoder) -> dict[str, Tensor]:
    """Return the encoder's state dict without the batch norms' counters."""
    return {name: tensor for name, tensor in encoder.state_dict().items() if not name.endswith("num_batches_tracked")}
