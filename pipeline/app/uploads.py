"""Pictures that people send: checked before anything opens them, kept in memory alone, and shown upright."""

import io
from dataclasses import dataclass

from PIL import Image

from pipeline.errors import UserError
from pipeline.features.images import Pixels, read_upright

MAX_MEGABYTES = 20
MAX_BYTES = MAX_MEGABYTES * 2**20
"""Of a picture's file; how many pixels it may have, `pipeline.features.images` decides."""

FORMATS = {
    "JPEG": ("jpg", "jpeg"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
}
"""Pillow's names of the formats that are opened, with the endings of their files. Pillow's other readers are kept from
what strangers send: some of them start programs."""
_KINDS = f"{', '.join(list(FORMATS)[:-1])} or {list(FORMATS)[-1]}"

PREVIEW = 1024
"""Longer side of the picture that the page shows, in px."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as it came."""

    name: str
    content: bytes
    """Of the file."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A picture as the page shows it: upright, its longer side `PREVIEW` px."""

    jpeg: bytes
    width: int
    """In px."""
    height: int


def check(picture: Picture) -> None:
    """See that a picture's file is not too large and of a format that may be opened; raises `UserError` otherwise."""
    if len(picture.content) > MAX_BYTES:
        raise UserError(
            f"{picture.name}: has {len(picture.content) / 2**20:.1f} MB, more than {MAX_MEGABYTES}; use a smaller one"
        )
    try:
        Image.open(io.BytesIO(picture.content), formats=list(FORMATS)).close()
    except Image.DecompressionBombError:
        return  # Whoever decodes it says how large it is.
    except Exception as error:  # Pillow's readers meet broken files with errors of every kind.
        raise UserError(f"{picture.name}: is no picture that can be opened here; use {_KINDS}") from error


def preview(picture: Picture) -> Preview:
    """Make what the page shows of a picture. Raises `UserError` where it is broken or has too many pixels."""
    pixels = read_upright(picture.content, PREVIEW, picture.name)
    height, width = pixels.shape[:2]
    return Preview(jpeg=as_jpeg(pixels), width=width, height=height)


def as_jpeg(pixels: Pixels) -> bytes:
    """Make a JPEG of a picture, uint8 RGB [height, width, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()
