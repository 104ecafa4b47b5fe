"""Images as the encoder sees them: any file that Pillow reads, as upright RGB squares, normalized.

B images, S side of the square in px.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.errors import UserError

Pixels = npt.NDArray[np.uint8]

View = Literal[
    "whole",
    "top_left",
    "top_right",
    "bottom_left",
    "bottom_right",
    "center",
    "whole_flipped",
    "top_left_flipped",
    "top_right_flipped",
    "bottom_left_flipped",
    "bottom_right_flipped",
    "center_flipped",
]
"""What a row shows of a picture: all of it or a part, the second six mirrored left to right."""

# Of its width and of its height: what a view of a part takes of the picture.
PART = 7 / 8
# Where in the rest the part begins, as shares of the room to the left of it and above it.
_CORNERS = {
    "top_left": (0.0, 0.0),
    "top_right": (1.0, 0.0),
    "bottom_left": (0.0, 1.0),
    "bottom_right": (1.0, 1.0),
    "center": (0.5, 0.5),
}

# Decoding takes three bytes a pixel and more, in every thread, and a small file can claim any size.
MAX_PIXELS = 80_000_000

# Of all pictures in ImageNet, by channel; torchvision's weights expect them.
MEAN = (0.485, 0.456, 0.406)
STANDARD_DEVIATION = (0.229, 0.224, 0.225)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


Source = Path | bytes | Image.Image
"""A picture's file, the bytes of one, or what Pillow made of one."""


def read_image(source: Source, size: int, name: str = "image") -> Pixels:
    """Read a picture and resize all of it to a square, whatever its shape: uint8 RGB [size, size, 3].

    Raises `UserError` as `read_views` does.
    """
    pixels: Pixels = read_views(source, size, ("whole",), name)[0]
    return pixels


def read_upright(source: Source, side: int, name: str = "image") -> Pixels:
    """Read a picture as people see it, its longer side `side` px: uint8 RGB [height, width, 3].

    Raises `UserError` as `read_views` does.
    """
    picture = _upright(source, side, name)
    scale = side / max(picture.size)
    width, height = (max(1, round(scale * length)) for length in picture.size)
    return np.array(picture.resize((width, height), Image.Resampling.BICUBIC))


def read_views(source: Source, size: int, views: Sequence[View], name: str = "image") -> Pixels:
    """Read a picture and resize views of it to squares: uint8 RGB [views, size, size, 3].

    The EXIF orientation is applied, transparency shows white, the first frame stands for an animation. `name`
    is what an error calls a picture that is no file. Raises `UserError`, naming the file, where it is missing,
    truncated, no picture, or has more than `MAX_PIXELS` pixels.
    """
    picture = _upright(source, size, name)
    return np.stack([_view(picture, size, view) for view in views])


def _upright(source: Source, size: int, name: str) -> Image.Image:
    """The picture upright and RGB, no smaller than twice `size` where it was larger."""
    if isinstance(source, Path):
        source, name = read_bytes(source), str(source)
    try:
        with _opened(source, size) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} px, more than {MAX_PIXELS // 10**6} million in all")
            image.load()  # which turns a TIFF upright, and takes its orientation away
            orientation = _orientation(image)
            picture = _to_rgb(image)
            return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: cannot be read as a picture (in no form that is known); replace the file") from error
    except Exception as error:  # Pillow's readers meet broken files with errors of every kind.
        raise UserError(
            f"{name}: cannot be read as a picture ({' '.join(str(error).split())}); replace the file"
        ) from error


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height, in px, of a picture that `read_image` reads, with the EXIF orientation applied."""
    with Image.open(path) as image:
        if image.format == "TIFF":
            image.load()  # as above
        width, height = image.size
        # From 5 on, orientations turn the picture by a quarter.
        return (height, width) if _orientation(image) in range(5, 9) else (width, height)


@contextmanager
def _opened(source: bytes | Image.Image, size: int) -> Iterator[Image.Image]:
    if isinstance(source, Image.Image):
        yield source
        return
    with Image.open(io.BytesIO(source)) as image:
        # A JPEG decodes faster at a half or a quarter of its size. While twice the size needed remains,
        # the square stays the same to 52 dB (median over COCO photographs); with less, to 41 dB.
        image.draft(None, (2 * size, 2 * size))
        yield image


def _view(picture: Image.Image, size: int, view: View) -> Pixels:
    part = view.removesuffix("_flipped")
    box = None
    if part in _CORNERS:
        left, top = (share * (1 - PART) * side for share, side in zip(_CORNERS[part], picture.size, strict=True))
        box = (left, top, left + PART * picture.width, top + PART * picture.height)
    square = picture.resize((size, size), Image.Resampling.BICUBIC, box)
    return np.array(square if view == part else square.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def read_bytes(path: Path) -> bytes:
    """Read an image file whole. Raises `UserError`, naming it, where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it or name another file") from error


def normalize(batch: torch.Tensor) -> torch.Tensor:
    """Scale pictures, uint8 [B, S, S, 3], by ImageNet's mean and deviation: float32 [B, 3, S, S]."""
    mean = torch.tensor(MEAN, device=batch.device)
    deviation = torch.tensor(STANDARD_DEVIATION, device=batch.device)
    return ((batch.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Cameras write broken EXIF blocks; like any viewer, take the picture as it is stored.
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit gray; Pillow's own conversion clips at 255 instead of scaling.
        deep = np.asarray(image).astype(np.int64).clip(0, 0xFFFF)
        return Image.fromarray((deep // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known white; store 8-bit colors")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
