"""Images that visitors upload or paste. They are checked before they are decoded, and stay in memory."""

import io
from dataclasses import dataclass

from PIL import Image

from pipeline.errors import UserError
from pipeline.features.images import Pixels, read_visible
from pipeline.features.views import Frame, View

MAX_MEGABYTES = 20
MAX_BYTES = MAX_MEGABYTES * 2**20
"""Maximum size of an image file. `pipeline.features.images` limits the number of pixels."""

FORMATS = {
    "JPEG": ("jpg", "jpeg"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
}
"""File extensions of the allowed formats, by Pillow's name of the format. Some of Pillow's other readers would start
external programs on uploads."""
_FORMAT_NAMES = f"{', '.join(list(FORMATS)[:-1])} or {list(FORMATS)[-1]}"

PREVIEW_SIZE = 1024
"""Longer side of previews, px."""
JPEG_QUALITY = 90
"""Quality of previews and thumbnails, by Pillow's scale of 0 to 95."""


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image file in memory: an upload, a pasted image or a sample."""

    name: str
    """File name, for errors."""
    content: bytes
    """Content of the file, as uploaded."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """An image for display: upright, with `PREVIEW_SIZE` px at the longer side."""

    jpeg: bytes
    """JPEG file."""
    width: int
    """Width, px."""
    height: int
    """Height, px."""


def check_image(image: ImageFile) -> None:
    """Check size and format of an image file without decoding it.

    Raises:
        UserError: The file is too large or its format is not in `FORMATS`.
    """
    if len(image.content) > MAX_BYTES:
        megabytes = len(image.content) / 2**20
        raise UserError(
            f"{image.name}: {megabytes:.1f} MB is over the limit of {MAX_MEGABYTES} MB. Use a smaller image."
        )
    try:
        Image.open(io.BytesIO(image.content), formats=list(FORMATS)).close()
    except Image.DecompressionBombError:
        return  # `make_preview` reports it, with the number of pixels.
    except Exception as error:  # Pillow raises errors of many types for broken files.
        raise UserError(f"{image.name}: not a supported image format. Use {_FORMAT_NAMES}.") from error


def make_preview(image: ImageFile, frame: Frame, view: View) -> Preview:
    """Make the preview of an image file: the part that the grid of a model covers.

    Args:
        image: The image.
        frame: Input of the model's encoder.
        view: View of the image that the model captions.

    Raises:
        UserError: The file is broken or has too many pixels.
    """
    pixels = read_visible(image.content, PREVIEW_SIZE, frame, view, image.name)
    height, width = pixels.shape[:2]
    return Preview(jpeg=encode_jpeg(pixels), width=width, height=height)


def encode_jpeg(pixels: Pixels) -> bytes:
    """Encode an image, uint8 RGB [H, W, 3], as JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
