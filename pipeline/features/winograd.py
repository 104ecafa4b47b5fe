"""Convolutions of 3 x 3 with a quarter of the multiplications (Lavin and Gray 2016, Fast Algorithms for Convolutional
Neural Networks).

A tile of 4 x 4 outputs depends on 6 x 6 inputs. Both are transformed by fixed matrices, one axis after the other, such
that the convolution becomes a product for each of the 36 values of a tile: 36 multiplications for each pair of input
and output channel instead of 144. The result is equal to rounding.

The transforms are sums of slices, computed for some images at a time, whose tiles stay in the processor's cache. The
products are one grouped 1 x 1 convolution of oneDNN, which is faster than PyTorch's batched products.

Shapes: B images, I and O input and output channels, H and W height and width, R and C rows and columns of tiles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_TILE = 4
"""Rows and columns of outputs in a tile."""
_WINDOW = _TILE + 2
"""Rows and columns of inputs that a tile depends on, and of a transformed tile."""
_NUM_PRODUCTS = _WINDOW * _WINDOW

_WEIGHT_TRANSFORM = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)

_MIN_TILES, _MAX_TILES = 64, 256
"""Tiles that are transformed at a time: enough for fast products, and few enough for the cache."""
_MIN_CHANNELS = 64
"""Minimum input and output channels, since fewer multiply less for each sum of the transforms."""
_MAX_PADDING = 1.7
"""Maximum area of the tiles relative to that of the outputs; the last tiles reach beyond the lower and right edge."""


_GROUPED_POINTWISE = ([0, 0], [1, 1], [1, 1], _NUM_PRODUCTS)
"""Padding, stride, dilation and groups of the convolution that computes the products."""


class WinogradConvolution:
    """A 3 x 3 convolution of stride 1 and padding 1 with a bias, for a CPU in float32, without gradients."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        """Transform the weight of a convolution for which `supports` is true. The convolution stays unchanged."""
        assert convolution.bias is not None
        weight = convolution.weight.detach().double()  # [O, I, 3, 3]
        transform = torch.tensor(_WEIGHT_TRANSFORM, dtype=torch.float64)
        # Tiles are transformed along columns last, so columns come first.
        products = torch.einsum("ck,rj,oijk->croi", transform, transform, weight).float()  # [6, 6, O, I]
        self._out_channels, in_channels = weight.shape[:2]
        self._weight: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            products.reshape(-1, in_channels, 1, 1),
            *_GROUPED_POINTWISE,
            [1, _NUM_PRODUCTS * in_channels, _MIN_TILES, 1],
        )
        # Product (1, 1) is the only one that adds the same to all outputs of a tile.
        bias = torch.zeros(_WINDOW, _WINDOW, self._out_channels)
        bias[1, 1] = convolution.bias.detach()
        self._bias = bias.flatten()

    @staticmethod
    def supports(convolution: nn.Conv2d) -> bool:
        """Whether a convolution can be computed, and may be faster."""
        return (
            convolution.kernel_size == (3, 3)
            and convolution.stride == (1, 1)
            and convolution.padding == (1, 1)
            and convolution.dilation == (1, 1)
            and convolution.groups == 1
            and convolution.bias is not None
            and min(convolution.in_channels, convolution.out_channels) >= _MIN_CHANNELS
            and convolution.in_channels % 16 == convolution.out_channels % 16 == 0
        )

    @staticmethod
    def pays(features: Tensor) -> bool:
        """Whether this is faster than oneDNN's own convolutions for features [B, I, H, W]."""
        num_images, _, height, width = features.shape
        num_tiles = _num_tiles(height, width)
        return (
            num_tiles <= _MAX_TILES
            and _num_images_at_once(num_images, num_tiles) * num_tiles >= _MIN_TILES
            and num_tiles * _TILE**2 <= _MAX_PADDING * height * width
        )

    def __call__(self, features: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Compute the convolution, the addition of a shortcut and ReLU.

        Args:
            features: Input [B, I, H, W], channels last.
            shortcut: Summand [B, O, H, W], channels last, which is overwritten by the result; or None.

        Returns:
            The result [B, O, H, W], channels last.
        """
        num_images, in_channels, height, width = features.shape
        result = shortcut
        if result is None:
            shape = num_images, self._out_channels, height, width
            result = torch.empty(shape, memory_format=torch.channels_last)
        step = _num_images_at_once(num_images, _num_tiles(height, width))
        tiles = _Tiles(step, height, width, in_channels, self._out_channels)
        inputs, outputs = (torch.split(images.permute(0, 2, 3, 1), step) for images in (features, result))
        for images, summands in zip(inputs, outputs, strict=True):
            products = torch.ops.mkldnn._convolution_pointwise(
                tiles.transform(images), self._weight, self._bias, *_GROUPED_POINTWISE, "none", [], ""
            )
            if shortcut is None:
                torch.clamp_min(tiles.transform_back(products), 0, out=summands)
            else:
                summands.add_(tiles.transform_back(products)).relu_()
        return result


def _num_tiles(height: int, width: int) -> int:
    """Return the number of tiles of an image."""
    return -(-height // _TILE) * -(-width // _TILE)


def _num_images_at_once(num_images: int, num_tiles: int) -> int:
    """Return the smallest power of two with enough tiles that divides the number of images, or the largest of these."""
    step = 1
    while step * num_tiles < _MIN_TILES and num_images % (2 * step) == 0:
        step *= 2
    return step


class _Tiles:
    """Buffers of the tiles of some images.

    Both transforms work along one axis, then along the other. The buffers between them are ordered such that as many
    sums as possible are over long contiguous parts.
    """

    def __init__(self, num_images: int, height: int, width: int, in_channels: int, out_channels: int) -> None:
        rows, columns = -(-height // _TILE), -(-width // _TILE)
        self._shape = (num_images, rows, columns)
        padded_width = _TILE * columns + 2
        padded = torch.zeros(num_images, _TILE * rows + 2, padded_width, in_channels)
        self._inner = padded[:, 1 : height + 1, 1 : width + 1]
        by_rows = torch.empty(num_images, rows, padded_width, _WINDOW, in_channels)
        transformed = torch.empty(num_images, rows, columns, _WINDOW, _WINDOW, in_channels)
        self._row_slices = [padded[:, k::_TILE][:, :rows] for k in range(_WINDOW)]
        self._by_rows = by_rows.unbind(3)
        self._row_sums = [torch.empty(num_images, rows, padded_width, in_channels) for _ in range(2)]
        self._column_slices = [by_rows[:, :, k::_TILE][:, :, :columns] for k in range(_WINDOW)]
        self._by_columns = transformed.unbind(3)
        self._column_sums = [torch.empty(num_images, rows, columns, _WINDOW, in_channels) for _ in range(2)]
        # [1, 36 I, tiles, 1], channels last
        self._transformed = transformed.view(1, -1, 1, _NUM_PRODUCTS * in_channels).permute(0, 3, 1, 2)

        back = torch.empty(num_images, rows, _WINDOW, columns, _TILE, out_channels)
        self._back_columns = back.transpose(2, 3).unbind(4)  # 4 of [B, R, C, 6, O]
        self._back_column_sums = [torch.empty(num_images, rows, columns, _WINDOW, out_channels) for _ in range(4)]
        self._back_rows = back.unbind(2)  # 6 of [B, R, C, 4, O]
        self._back_row_sums = [torch.empty(num_images, rows, columns, _TILE, out_channels) for _ in range(4)]
        outputs = torch.empty(num_images, rows, _TILE, columns, _TILE, out_channels)
        self._output_rows = outputs.unbind(2)
        self._outputs = outputs.view(num_images, _TILE * rows, _TILE * columns, -1)[:, :height, :width]

    def transform(self, images: Tensor) -> Tensor:
        """Transform images [B, H, W, I] to tiles [1, 36 I, B R C, 1], which the next call overwrites."""
        self._inner.copy_(images)
        _transform(self._row_slices, self._by_rows, self._row_sums)
        _transform(self._column_slices, self._by_columns, self._column_sums)
        return self._transformed

    def transform_back(self, products: Tensor) -> Tensor:
        """Transform products [1, 36 O, B R C, 1] to outputs [B, H, W, O], which the next call overwrites."""
        tiles = products.permute(0, 2, 3, 1).view(*self._shape, _WINDOW, _WINDOW, -1)  # [B, R, C, 6, 6, O]
        _transform_back(tiles.unbind(3), self._back_columns, self._back_column_sums)
        _transform_back(self._back_rows, self._output_rows, self._back_row_sums)
        return self._outputs


def _transform(inputs: Sequence[Tensor], outputs: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
    """Transform six slices of the input along an axis to the six slices of tiles.

    The matrix has the rows (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0) and (0, 4, 0, -5, 0, 1).
    """
    even, odd = sums
    torch.sub(inputs[0], inputs[2], out=odd)
    torch.sub(inputs[4], inputs[2], out=even)
    torch.add(even, odd, alpha=4, out=outputs[0])
    torch.sub(inputs[3], inputs[1], out=odd)
    torch.add(even, odd, alpha=2, out=outputs[3])
    torch.sub(even, odd, alpha=2, out=outputs[4])
    torch.sub(inputs[5], inputs[3], out=even)
    torch.sub(even, odd, alpha=4, out=outputs[5])
    torch.sub(inputs[4], inputs[2], alpha=4, out=even)
    torch.sub(inputs[3], inputs[1], alpha=4, out=odd)
    torch.add(even, odd, out=outputs[1])
    torch.sub(even, odd, out=outputs[2])


def _transform_back(inputs: Sequence[Tensor], outputs: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
    """Transform six slices of products along an axis to the four slices of outputs.

    The matrix has the rows (1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0) and (0, 1, -1, 8, -8, 1).
    """
    sum_1, difference_1, sum_2, difference_2 = sums
    torch.add(inputs[1], inputs[2], out=sum_1)
    torch.sub(inputs[1], inputs[2], out=difference_1)
    torch.add(inputs[3], inputs[4], out=sum_2)
    torch.sub(inputs[3], inputs[4], out=difference_2)
    torch.add(sum_1, sum_2, alpha=4, out=outputs[2])
    torch.add(difference_1, difference_2, alpha=2, out=outputs[1])
    torch.add(inputs[0], sum_1.add_(sum_2), out=outputs[0])
    torch.add(difference_1.add_(inputs[5]), difference_2, alpha=8, out=outputs[3])
