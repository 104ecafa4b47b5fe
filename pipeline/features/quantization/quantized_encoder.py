"""The frozen ResNet in whole numbers of 8 bits, on processors: twice as fast as in bfloat16.

Activations become 0 to 255, weights -127 to 127. Sums of their products are exact, so that a grid has the same bits
whatever the batch and the number of threads.

B images, S side of the picture in px, I and O channels taken and given by a convolution, H and W height and width.
A scale is what a step of a channel's whole numbers is worth.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck

from pipeline.errors import UserError
from pipeline.features.images import MEAN, STANDARD_DEVIATION
from pipeline.features.quantization.moments import Moments, find_moments

LARGEST_ACTIVATION, LARGEST_WEIGHT = 255, 127

# With one scale for all (0), small channels lose digits; with one for each (1), the weights that meet large ones do.
# Grids of ImageNet's ResNet-18 move by 0.070 with 0, by 0.067 with 0.5 and by 0.088 with 1.
EVENNESS = 0.5

Block: TypeAlias = BasicBlock | Bottleneck


class QuantizedEncoder(nn.Module):
    """A frozen ResNet up to some layer, in 8 bits: pictures, uint8 [B, S, S, 3], to grids, float32 [B, O, H, W]."""

    def __init__(self, encoder: nn.Module) -> None:
        """Raises `UserError` where this processor cannot multiply in 8 bits, or where weights are not finite."""
        super().__init__()
        if not multiplies_exactly():
            raise UserError(
                "encode.precision int8 needs a processor with VNNI instructions, as Intel's servers have had since"
                " 2019 and AMD's since 2022, and PyTorch's build for them; use such a machine, or"
                " features made in bfloat16 or float32"
            )
        moments = find_moments(encoder)
        children = dict(encoder.named_children())
        layers = [child for child in children.values() if isinstance(child, nn.Sequential)]
        blocks = [cast(Block, block) for layer in layers for block in layer]
        stem, norm = cast(nn.Conv2d, children["conv1"]), cast(nn.BatchNorm2d, children["bn1"])
        scales = _stream_scales(moments[norm], blocks, moments)
        self._frame = int(stem.padding[0])
        self._stem = _stem(stem, norm, scales[0])
        self._blocks = [
            _QuantizedBlock(block, moments, taken, given)
            for block, taken, given in zip(blocks, scales, [*scales[1:], None], strict=True)
        ]

    def forward(self, pictures: Tensor) -> Tensor:
        """Map pictures, uint8 [B, S, S, 3], to grids, float32 [B, O, H, W]."""
        stream = self._stem(_framed(pictures, self._frame))
        stream = torch.ops.quantized.max_pool2d(stream, [3, 3], [2, 2], [1, 1], [1, 1], False)  # of every ResNet
        for block in self._blocks:
            stream = block(stream)
        return stream


def multiplies_exactly() -> bool:
    """Whether this processor's sums of 8-bit products keep all their digits; older ones cut two products to 16 bits."""
    ones = torch.ones(64, dtype=torch.float64)
    kernel = Kernel(weight=ones[None, :, None, None], bias=ones[:1] * 0)
    try:
        convolution = QuantizedConvolution(kernel, 1, 0, ones, None)
        found = convolution(torch.full((1, 64, 1, 1), LARGEST_ACTIVATION, dtype=torch.uint8))
    except (AttributeError, RuntimeError):  # PyTorch for other than Intel's and AMD's processors lacks the operations
        return False
    return bool(torch.isclose(found, torch.tensor(64.0 * LARGEST_ACTIVATION)))


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A convolution with its batch norm folded in, float64."""

    weight: Tensor
    """[O, I, k, k]"""
    bias: Tensor
    """[O]"""

    @classmethod
    def folded(cls, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> "Kernel":
        """Fold a batch norm in eval mode into the convolution before it; both stay as they are.

        Raises `UserError` where the result is not finite: no whole number would show it.
        """
        exact = fuse_conv_bn_eval(copy.deepcopy(convolution).double(), copy.deepcopy(norm).double())
        weight, bias = exact.weight.detach(), cast(Tensor, exact.bias).detach()
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise UserError(
                "encode.weights hold values that are NaN or infinite, or variances below 0; use other weights"
            )
        return cls(weight=weight, bias=bias)

    def beside(self, other: "Kernel") -> "Kernel":
        """The kernel whose convolution of both inputs, joined by channels, is the sum of both convolutions."""
        room = (self.weight.shape[-1] - other.weight.shape[-1]) // 2
        weight = torch.cat([self.weight, functional.pad(other.weight, [room] * 4)], 1)
        return Kernel(weight=weight, bias=self.bias + other.bias)


class QuantizedConvolution:
    """A convolution of whole numbers, with its bias and a ReLU, to whole numbers or, without scales, to real ones.

    Its operations are those to which PyTorch compiles quantized models. They want their scales one by one, so that all
    but the one for each output channel are in the weights already.
    """

    def __init__(
        self,
        kernel: Kernel,
        stride: int,
        padding: int,
        taken: Tensor,
        given: Tensor | None,
        zero: Tensor | None = None,
    ) -> None:
        """`taken` [I] and `given` [O] are scales; `zero` [I], 0 unless given, what stands for 0 in what is taken."""
        weight = kernel.weight * taken[:, None, None]
        largest = weight.abs().amax((1, 2, 3))
        scale = torch.where(largest > 0, largest / LARGEST_WEIGHT, 1)
        whole = (weight / scale[:, None, None, None]).round().to(torch.int8)
        bias = kernel.bias
        if zero is not None:
            bias = bias - scale * (whole.sum((2, 3)).double() @ zero)
        worth = torch.ones_like(scale) if given is None else given
        self._scale = (scale / worth).float()
        self._bias = (bias / worth).float()
        self._offset = torch.zeros(len(whole), dtype=torch.int32)
        self._stride, self._padding = [stride] * 2, [padding] * 2
        self._type = torch.float32 if given is None else torch.uint8
        self._whole = whole
        self._packed: dict[torch.Size, Tensor] = {}

    def __call__(self, activations: Tensor) -> Tensor:
        """Map activations, uint8 [B, I, H, W], to rectified ones."""
        return cast(
            Tensor,
            torch.ops.onednn.qconv_pointwise(
                activations, 1.0, 0, self._weight(activations.shape), self._scale, self._offset, self._bias,
                self._stride, self._padding, [1, 1], 1, 1.0, 0, self._type, "relu", [], "",
            ),
        )  # fmt: skip

    def onto(self, stream: Tensor, worth: float, activations: Tensor) -> Tensor:
        """As called, with `worth` times `stream` [B, O, H, W] added, in whose place the result is."""
        return cast(
            Tensor,
            torch.ops.onednn.qconv2d_pointwise.binary(
                activations, 1.0, 0, self._weight(activations.shape), self._scale, self._offset, stream, self._bias,
                self._stride, self._padding, [1, 1], 1, 1.0, 0, self._type, worth, 0, "sum", 1.0, "relu", [], "",
            ),
        )  # fmt: skip

    def _weight(self, taken: torch.Size) -> Tensor:
        """The weights as oneDNN wants them for activations of this shape; in another form, each call would convert."""
        if taken not in self._packed:
            self._packed[taken] = torch.ops.onednn.qconv_prepack(
                self._whole, self._scale, 1.0, 0, self._stride, self._padding, [1, 1], 1, taken
            )
        return self._packed[taken]


class _QuantizedBlock:
    """A residual block. What a convolution of the shortcut adds, the block's last one computes beside its own."""

    def __init__(
        self, block: Block, moments: Mapping[nn.BatchNorm2d, Moments], taken: Tensor, given: Tensor | None
    ) -> None:
        """The scales of the stream that it takes and gives; it gives real numbers where `given` is None."""
        self._first: list[QuantizedConvolution] = []
        *first, (last, last_norm) = _convolutions(block)
        inside = taken
        for convolution, norm in first:
            (scales,) = _scales([moments[norm].largest])
            kernel = Kernel.folded(convolution, norm)
            self._first.append(
                QuantizedConvolution(kernel, convolution.stride[0], int(convolution.padding[0]), inside, scales)
            )
            inside = scales
        kernel = Kernel.folded(last, last_norm)
        self._every: int | None = None  # of the stream's rows and columns, that the shortcut's convolution takes
        if block.downsample is not None:
            convolution, norm = block.downsample
            self._every = convolution.stride[0]
            kernel = kernel.beside(Kernel.folded(convolution, norm))
            inside = torch.cat([inside, taken])
        self._last = QuantizedConvolution(kernel, 1, int(last.padding[0]), inside, given)
        self._real = taken.float()[:, None, None] if given is None else None
        self._worth = 1.0 if given is None else float(taken[0] / given[0])

    def __call__(self, stream: Tensor) -> Tensor:
        activations = stream
        for convolution in self._first:
            activations = convolution(activations)
        if self._every:
            return self._last(torch.cat([activations, stream[:, :, :: self._every, :: self._every]], 1))
        return self._last.onto(stream if self._real is None else stream * self._real, self._worth, activations)


def _convolutions(block: Block) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    children = dict(block.named_children())
    names = [name for name in children if name.startswith("conv")]
    return [
        (cast(nn.Conv2d, children[name]), cast(nn.BatchNorm2d, children[name.replace("conv", "bn")])) for name in names
    ]


def _stem(convolution: nn.Conv2d, norm: nn.BatchNorm2d, given: Tensor) -> QuantizedConvolution:
    """The first convolution, of pictures as they are, not normalized, within a frame of ImageNet's mean."""
    taken = 1 / (255 * torch.tensor(STANDARD_DEVIATION, dtype=torch.float64))
    zero = 255 * torch.tensor(MEAN, dtype=torch.float64)
    return QuantizedConvolution(Kernel.folded(convolution, norm), convolution.stride[0], 0, taken, given, zero)


def _framed(pictures: Tensor, width: int) -> Tensor:
    """Pictures, uint8 [B, S, S, 3], in a frame that counts as 0 once normalized: [B, 3, S + 2 width, ...]."""
    count, height, breadth, _ = pictures.shape
    mean = (255 * torch.tensor(MEAN)).round().to(torch.uint8)
    framed = mean.repeat(count, height + 2 * width, breadth + 2 * width, 1)
    framed[:, width:-width, width:-width] = pictures
    return framed.permute(0, 3, 1, 2)


def _scales(run: Sequence[Tensor]) -> list[Tensor]:
    """Scales [O] of activations that reach up to what `run` tells [O], one after the other in a stream.

    A block adds to its stream in place, so that from one to the next all channels' scales change in one proportion.
    """
    shares = torch.stack([largest / largest.max().clamp_min(1e-30) for largest in run]).amax(0)
    evened = _rounded(shares.clamp_min(1e-3) ** EVENNESS)
    tops = [(largest / evened).max() for largest in run]
    return [evened * _rounded(torch.where(top > 0, top, 1) / LARGEST_ACTIVATION) for top in tops]


def _rounded(values: Tensor) -> Tensor:
    """To 10 binary digits, so that machines agree that round the sums otherwise which the values come from."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 1024).round() / 1024, exponent)


def _stream_scales(stem: Moments, blocks: Sequence[Block], moments: Mapping[nn.BatchNorm2d, Moments]) -> list[Tensor]:
    """Scales of what each block takes."""
    stream = stem
    runs = [[stem.largest]]
    for block in blocks[:-1]:
        *_, (_, norm) = _convolutions(block)
        if block.downsample is None:
            stream = moments[norm] + stream.rectified
            runs[-1].append(stream.largest)
        else:
            stream = moments[norm] + moments[block.downsample[1]]
            runs.append([stream.largest])
    return [scales for run in runs for scales in _scales(run)]
