"""A frozen ResNet of torchvision in int8, for CPUs.

Activations are uint8, 0 to 255, and weights int8, -127 to 127. Sums of their products are exact, so a grid has the same
bits at every batch size and number of threads. `python -m benchmarks encoding` measures its speed.

A scale is the real value of one integer step of a channel: value = scale * integer.

Shapes: B images, Y and X height and width of the image in px, I and O input and output channels of a convolution,
k kernel size, H and W height and width of its output.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.errors import UserError
from pipeline.features.quantization.moments import Moments, estimate_moments
from pipeline.features.resnets import IMAGENET
from pipeline.features.torchvision_resnets import Block

MAX_ACTIVATION, MAX_WEIGHT = 255, 127

# Scales of activations are proportional to the ranges of the channels to this power. At 0 (one scale for all channels)
# channels with small ranges lose precision; at 1 (one scale per channel) the weights do. Relative error of the grids of
# ImageNet's ResNet-18: 0.070 at 0, 0.067 at 0.5, 0.088 at 1.
SCALE_EXPONENT = 0.5


class QuantizedEncoder(nn.Module):
    """A frozen ResNet of torchvision up to some layer, in int8."""

    def __init__(self, encoder: nn.Module) -> None:
        """Quantize an encoder, which stays unchanged.

        Raises:
            UserError: This CPU lacks exact int8 arithmetic, or weights are not finite.
        """
        super().__init__()
        self.pool = encoder.pool
        if not supports_int8():
            raise UserError(
                "encode.precision: int8 needs a CPU with VNNI instructions (Intel servers since 2019, AMD since 2022)"
                " and a PyTorch build for them. Use another machine, or set encode.precision to bfloat16 or float32."
            )
        moments = estimate_moments(encoder)
        children = dict(encoder.named_children())
        layers = [child for child in children.values() if isinstance(child, nn.Sequential)]
        blocks = [cast(Block, block) for layer in layers for block in layer]
        conv1, bn1 = cast(nn.Conv2d, children["conv1"]), cast(nn.BatchNorm2d, children["bn1"])
        scales = _block_input_scales(moments[bn1], blocks, moments)
        self._padding = int(conv1.padding[0])
        self._stem = _quantize_stem(conv1, bn1, scales[0])
        self._blocks = [
            _QuantizedBlock(block, moments, input_scale, output_scale)
            for block, input_scale, output_scale in zip(blocks, scales, [*scales[1:], None], strict=True)
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Encode images, uint8 [B, Y, X, 3], as grids, float32 [B, O, H, W]."""
        residual = self._stem(_pad_with_mean(images, self._padding))  # uint8 [B, O, H, W]
        # The max pooling after the stem of every ResNet.
        residual = torch.ops.quantized.max_pool2d(residual, [3, 3], [2, 2], [1, 1], [1, 1], False)
        for block in self._blocks:
            residual = block(residual)
        return residual


def supports_int8() -> bool:
    """Whether sums of int8 products are exact on this CPU. Without VNNI they saturate at 16 bits."""
    ones = torch.ones(64, dtype=torch.float64)
    kernel = Kernel(weight=ones[None, :, None, None], bias=ones[:1] * 0)
    try:
        convolution = QuantizedConvolution(kernel, 1, 0, ones, None)
        result = convolution(torch.full((1, 64, 1, 1), MAX_ACTIVATION, dtype=torch.uint8))
    except (AttributeError, RuntimeError):  # PyTorch has these operators only for x86 CPUs.
        return False
    return bool(torch.isclose(result, torch.tensor(64.0 * MAX_ACTIVATION)))


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A convolution with its batch norm folded in, float64."""

    weight: Tensor
    """[O, I / groups, k, k]"""
    bias: Tensor
    """[O]"""

    @classmethod
    def fold(cls, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> "Kernel":
        """Fold a batch norm in eval mode into the convolution before it; both stay unchanged.

        Raises:
            UserError: The result is not finite.
        """
        folded = fuse_conv_bn_eval(copy.deepcopy(convolution).double(), copy.deepcopy(norm).double())
        weight, bias = folded.weight.detach(), cast(Tensor, folded.bias).detach()
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise UserError(
                "encode.weights: have NaN or infinite values, or negative running variances. Use other weights."
            )
        return cls(weight=weight, bias=bias)

    def concat_inputs(self, other: "Kernel") -> "Kernel":
        """Return a kernel for both inputs, concatenated by channel, whose output is the sum of both convolutions."""
        padding = (self.weight.shape[-1] - other.weight.shape[-1]) // 2
        weight = torch.cat([self.weight, functional.pad(other.weight, [padding] * 4)], 1)
        return Kernel(weight=weight, bias=self.bias + other.bias)


class QuantizedConvolution:
    """An int8 convolution with bias and ReLU.

    It uses the oneDNN operators of PyTorch's quantization. They accept a single input scale, so the scales of the input
    channels are multiplied into the weights.
    """

    def __init__(
        self,
        kernel: Kernel,
        stride: int,
        padding: int,
        input_scale: Tensor,
        output_scale: Tensor | None,
        zero_point: Tensor | None = None,
    ) -> None:
        """Quantize a kernel.

        Args:
            kernel: The convolution; the sizes of weight and input scale give the number of groups.
            stride: Its stride.
            padding: Its padding.
            input_scale: Scale of each input channel, [I].
            output_scale: Scale of each output channel, [O]; None outputs float32.
            zero_point: Input value that represents 0 in each channel, [I]; None means 0, as grouped
                convolutions need.
        """
        out_channels, channels_per_group = kernel.weight.shape[:2]
        self._groups = len(input_scale) // channels_per_group
        group_scale = input_scale.view(self._groups, channels_per_group)
        row_scale = group_scale.repeat_interleave(out_channels // self._groups, 0)  # [O, I / groups]
        weight = kernel.weight * row_scale[:, :, None, None]  # [O, I / groups, k, k]
        max_weight = weight.abs().amax((1, 2, 3))  # [O]
        weight_scale = torch.where(max_weight > 0, max_weight / MAX_WEIGHT, 1)  # [O]
        weight_int8 = (weight / weight_scale[:, None, None, None]).round().to(torch.int8)
        bias = kernel.bias
        if zero_point is not None:
            bias = bias - weight_scale * (weight_int8.sum((2, 3)).double() @ zero_point)
        self._output_dtype = torch.float32 if output_scale is None else torch.uint8
        if output_scale is None:
            output_scale = torch.ones_like(weight_scale)
        self._weight_scale = (weight_scale / output_scale).float()
        self._bias = (bias / output_scale).float()
        self._weight_zero_point = torch.zeros(len(weight_int8), dtype=torch.int32)
        self._stride, self._padding = [stride] * 2, [padding] * 2
        self._weight_int8 = weight_int8
        self._packed_weights: dict[torch.Size, Tensor] = {}

    def __call__(self, activations: Tensor) -> Tensor:
        """Convolve activations, uint8 [B, I, H, W], and apply the ReLU: [B, O, H, W]."""
        return cast(
            Tensor,
            torch.ops.onednn.qconv_pointwise(
                activations, 1.0, 0, self._packed_weight(activations.shape), self._weight_scale,
                self._weight_zero_point, self._bias, self._stride, self._padding, [1, 1], self._groups, 1.0, 0,
                self._output_dtype, "relu", [], "",
            ),
        )  # fmt: skip

    def add_to_residual(self, residual: Tensor, scale_ratio: float, activations: Tensor) -> Tensor:
        """Convolve activations, add the residual, and apply the ReLU, overwriting the residual with the result.

        Args:
            residual: [B, O, H, W] in the dtype of the output.
            scale_ratio: Scale of the residual divided by that of the output.
            activations: uint8 [B, I, H, W].

        Returns:
            [B, O, H, W].
        """
        return cast(
            Tensor,
            torch.ops.onednn.qconv2d_pointwise.binary(
                activations, 1.0, 0, self._packed_weight(activations.shape), self._weight_scale,
                self._weight_zero_point, residual, self._bias, self._stride, self._padding, [1, 1], self._groups, 1.0,
                0, self._output_dtype, scale_ratio, 0, "sum", 1.0, "relu", [], "",
            ),
        )  # fmt: skip

    def _packed_weight(self, input_shape: torch.Size) -> Tensor:
        """Return the weights in oneDNN's layout for an input shape; other layouts are converted in every call."""
        if input_shape not in self._packed_weights:
            self._packed_weights[input_shape] = torch.ops.onednn.qconv_prepack(
                self._weight_int8,
                self._weight_scale,
                1.0,
                0,
                self._stride,
                self._padding,
                [1, 1],
                self._groups,
                input_shape,
            )
        return self._packed_weights[input_shape]


class _QuantizedBlock:
    """A residual block. If its shortcut has a convolution, the last convolution computes both."""

    def __init__(
        self,
        block: Block,
        moments: Mapping[nn.BatchNorm2d, Moments],
        input_scale: Tensor,
        output_scale: Tensor | None,
    ) -> None:
        """Quantize a block.

        Args:
            block: The block.
            moments: Moments of the output of each batch norm.
            input_scale: Scale of each input channel, [I].
            output_scale: Scale of each output channel, [O]; None outputs float32.
        """
        *inner, (last, last_norm) = _convolutions(block)
        self._convolutions: list[QuantizedConvolution] = []
        scale = input_scale
        for convolution, norm in inner:
            (next_scale,) = _scales([moments[norm].upper_bound()])
            kernel = Kernel.fold(convolution, norm)
            stride, padding = convolution.stride[0], int(convolution.padding[0])
            self._convolutions.append(QuantizedConvolution(kernel, stride, padding, scale, next_scale))
            scale = next_scale
        kernel = Kernel.fold(last, last_norm)
        self._shortcut_stride: int | None = None
        if block.downsample is not None:
            convolution, norm = cast(tuple[nn.Conv2d, nn.BatchNorm2d], tuple(block.downsample))
            self._shortcut_stride = convolution.stride[0]
            kernel = kernel.concat_inputs(Kernel.fold(convolution, norm))
            scale = torch.cat([scale, input_scale])
        self._last = QuantizedConvolution(kernel, 1, int(last.padding[0]), scale, output_scale)
        # A float32 output needs a float32 residual.
        self._residual_scale = input_scale.float()[:, None, None] if output_scale is None else None  # [I, 1, 1]
        self._scale_ratio = 1.0 if output_scale is None else float(input_scale[0] / output_scale[0])

    def __call__(self, residual: Tensor) -> Tensor:
        """Map uint8 [B, I, H, W] to uint8 or float32 [B, O, H / stride, W / stride]. May overwrite the input."""
        activations = residual
        for convolution in self._convolutions:
            activations = convolution(activations)
        if self._shortcut_stride:
            shortcut = residual[:, :, :: self._shortcut_stride, :: self._shortcut_stride]
            return self._last(torch.cat([activations, shortcut], 1))
        if self._residual_scale is not None:
            residual = residual * self._residual_scale
        return self._last.add_to_residual(residual, self._scale_ratio, activations)


def _convolutions(block: Block) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """List the convolutions of a block, except the shortcut's, each with its batch norm."""
    children = dict(block.named_children())
    names = [name for name in children if name.startswith("conv")]
    return [
        (cast(nn.Conv2d, children[name]), cast(nn.BatchNorm2d, children[name.replace("conv", "bn")])) for name in names
    ]


def _quantize_stem(convolution: nn.Conv2d, norm: nn.BatchNorm2d, output_scale: Tensor) -> QuantizedConvolution:
    """Quantize the first convolution, with the normalization of the image folded in.

    Its input must be padded by `_pad_with_mean`.
    """
    input_scale = 1 / (255 * torch.tensor(IMAGENET.standard_deviation, dtype=torch.float64))
    zero_point = 255 * torch.tensor(IMAGENET.mean, dtype=torch.float64)
    kernel = Kernel.fold(convolution, norm)
    return QuantizedConvolution(kernel, convolution.stride[0], 0, input_scale, output_scale, zero_point)


def _pad_with_mean(images: Tensor, padding: int) -> Tensor:
    """Pad images with ImageNet's mean color: uint8 [B, Y, X, 3] to [B, 3, Y + 2 * padding, X + 2 * padding]."""
    num_images, height, width, _ = images.shape
    mean = (255 * torch.tensor(IMAGENET.mean)).round().to(torch.uint8)
    padded = mean.repeat(num_images, height + 2 * padding, width + 2 * padding, 1)
    padded[:, padding:-padding, padding:-padding] = images
    return padded.permute(0, 3, 1, 2)


def _scales(upper_bounds: Sequence[Tensor]) -> list[Tensor]:
    """Choose the scales of consecutive residual activations.

    A block adds to its residual in place with a single scale ratio, so consecutive scales must be proportional.

    Args:
        upper_bounds: Upper bound of each channel, [O], of each activation.

    Returns:
        The scales, [O], of each activation.
    """
    ranges = torch.stack([bound / bound.max().clamp_min(1e-30) for bound in upper_bounds]).amax(0)  # [O]
    relative_scale = _round_mantissa(ranges.clamp_min(1e-3) ** SCALE_EXPONENT)
    max_values = [(bound / relative_scale).max() for bound in upper_bounds]
    return [
        relative_scale * _round_mantissa(torch.where(max_value > 0, max_value, 1) / MAX_ACTIVATION)
        for max_value in max_values
    ]


def _round_mantissa(values: Tensor) -> Tensor:
    """Round to 10 binary digits, so that scales do not depend on the rounding of sums by a machine."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 1024).round() / 1024, exponent)


def _block_input_scales(
    stem_moments: Moments, blocks: Sequence[Block], moments: Mapping[nn.BatchNorm2d, Moments]
) -> list[Tensor]:
    """Choose the input scales of each block.

    Args:
        stem_moments: Moments of the stem's output, before its ReLU.
        blocks: The blocks.
        moments: Moments of the output of each batch norm.

    Returns:
        The scale of each input channel, [I], for each block.
    """
    residual = stem_moments
    # Runs of blocks that share a residual in place; a shortcut convolution starts a new run.
    runs = [[stem_moments.upper_bound()]]
    for block in blocks[:-1]:
        *_, (_, norm) = _convolutions(block)
        if block.downsample is None:
            residual = moments[norm] + residual.after_relu()
            runs[-1].append(residual.upper_bound())
        else:
            residual = moments[norm] + moments[cast(nn.BatchNorm2d, block.downsample[1])]
            runs.append([residual.upper_bound()])
    return [scale for run in runs for scale in _scales(run)]
