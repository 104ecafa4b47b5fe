"""Image files as the encoder's input: upright RGB images of one size, normalized.

Shapes: B images, N views of one image, H and W height and width of the input in px.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from pipeline.device import to_device
from pipeline.errors import UserError
from pipeline.features.resnets import Normalization
from pipeline.features.views import Frame, View, is_flipped, view_box

Pixels = npt.NDArray[np.uint8]
ImageSource = Path | bytes | Image.Image
"""An image: its path, the bytes of its file, or a Pillow image."""

# A small file can claim any size, and every thread holds a decoded image.
MAX_PIXELS = 80_000_000
MAX_DECODED_BYTES = 600_000_000
"""Maximum memory of a decoded image, its copies in gray or RGB and the buffers of its decoder, in bytes."""

_DECODER_BYTES = {"WEBP": 12, "AVIF": 6, "HEIF": 8, "JPEG2000": 16}
"""Bytes per pixel of the buffers of decoders that hold whole images, by Pillow's name of the format."""

# Images are converted in strips of this many pixels, so that intermediate copies stay small.
_STRIP_PIXELS = 2**21

NAMED_SUFFIXES = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif", ".avif", ".avifs", ".jxl"})
"""Suffixes of images that not every installation can read. `read_views` names what is missing."""

# Brands of ISO media files, at byte 8.
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}

_JPEG_END = b"\xff\xd9"
_JPEG_FILLERS = tuple(bytes([first, *range(1, 255)]) for first in (0x2C, 0x55, 0x8E, 0xB3, 0xDA, 0xFE))
"""Arbitrary entropy-coded data: bytes without 0xFF, which starts a marker."""

# Transposition that undoes each EXIF orientation.
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(source: ImageSource, size: int, name: str = "image") -> Pixels:
    """Read a whole image and resize it to a square, ignoring its aspect ratio.

    Args:
        source: The image.
        size: Side of the square in px.
        name: Name in errors of an image that is not a path.

    Returns:
        uint8 RGB [size, size, 3].

    Raises:
        UserError: As `read_views`.
    """
    pixels: Pixels = read_views(source, Frame(height=size, width=size), ("whole",), name)[0]
    return pixels


def read_visible(source: ImageSource, max_side: int, frame: Frame, view: View, name: str = "image") -> Pixels:
    """Read the part of an image that a grid covers, in its own aspect ratio.

    Args:
        source: The image.
        max_side: Length of the longer side in px.
        frame: Input of the encoder.
        view: View of the image.
        name: Name in errors of an image that is not a path.

    Returns:
        uint8 RGB [height, width, 3].

    Raises:
        UserError: As `read_views`.
    """
    image = _read_flat(source, max_side, name)
    box = frame.visible_box(*image.size, view)
    sides = box[2] - box[0], box[3] - box[1]
    width, height = (max(1, round(max_side / max(sides) * side)) for side in sides)
    return _mirror(_to_rgb(image.resize((width, height), Image.Resampling.BICUBIC, box)), view)


def read_views(source: ImageSource, frame: Frame, views: Sequence[View], name: str = "image") -> Pixels:
    """Read an image and fit its views to the encoder's input.

    The EXIF orientation is applied, transparent pixels become white, and only the first frame of an animation is used.
    A JPEG may lack its end-of-image marker. HEIC and HEIF files need the package pillow-heif.

    Args:
        source: The image.
        frame: Input of the encoder.
        views: The views to make.
        name: Name in errors of an image that is not a path.

    Returns:
        uint8 RGB [N, H, W, 3].

    Raises:
        UserError: The file is missing, truncated, not an image, has more than `MAX_PIXELS` pixels, needs more than
            `MAX_DECODED_BYTES`, or has pixels of unknown range (floats, 32-bit or negative integers).
    """
    image = _read_flat(source, max(frame.resized(frame.width, frame.height)), name)
    return np.stack([_render_view(image, frame, view) for view in views])


def upright_size(path: Path) -> tuple[int, int]:
    """Return width and height, in px, of a readable image file, with the EXIF orientation applied."""
    image = _open(read_image_file(path), None)
    if image.format == "TIFF":
        image.load()  # applies the orientation
    width, height = image.size
    # Orientations 5 to 8 swap width and height.
    return (height, width) if _orientation(image) in range(5, 9) else (width, height)


def read_image_file(path: Path) -> bytes:
    """Read the bytes of an image file.

    Raises:
        UserError: The file is missing or unreadable.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Restore the file.") from error


def normalize(batch: torch.Tensor, normalization: Normalization) -> torch.Tensor:
    """Normalize images as the encoder's weights expect: uint8 [B, H, W, 3] to float32 [B, 3, H, W]."""
    mean = to_device(torch.tensor(normalization.mean), batch.device)
    standard_deviation = to_device(torch.tensor(normalization.standard_deviation), batch.device)
    return ((batch.float() / 255 - mean) / standard_deviation).permute(0, 3, 1, 2)


def _read_flat(source: ImageSource, size: int, name: str) -> Image.Image:
    """Read an upright gray or RGB image, possibly at a reduced resolution of at least twice `size`."""
    if isinstance(source, Path):
        source, name = read_image_file(source), str(source)
    try:
        image = _open(source, size)
        _check_memory(image)
        _scale_transparency(image)
        try:
            image.load()  # applies the orientation of a TIFF and removes it from the metadata
        except OSError:
            if not (isinstance(source, bytes) and image.format in ("JPEG", "MPO") and _lacks_only_its_end(source)):
                raise
            image = _open(_with_end(source), size)
            image.load()
        orientation = _orientation(image)
        if orientation not in _TRANSPOSE:
            return _flatten(image)
        _check_memory(image, rotated=True)
        return _flatten(image).transpose(_TRANSPOSE[orientation])
    except UnidentifiedImageError as error:
        reason = _missing_support(source) if isinstance(source, bytes) else None
        raise UserError(f"{name}: {reason or 'not a supported image format. Replace the file.'}") from error
    except Exception as error:  # Pillow's decoders raise errors of every kind for broken files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: cannot be read as an image ({reason}). Replace the file.") from error


def _open(source: bytes | Image.Image, size: int | None) -> Image.Image:
    """Open an image; with a size, JPEGs are decoded at a reduced resolution of at least twice that size."""
    if isinstance(source, Image.Image):
        return source
    try:
        image: Image.Image = Image.open(io.BytesIO(source))
    except UnidentifiedImageError:
        if not (_brand(source) in _HEIF_BRANDS and _register_heif()):
            raise
        image = Image.open(io.BytesIO(source))
    if size is not None:
        # Decoding a JPEG at 1/2, 1/4 or 1/8 of its size is faster. At twice the target size or more, the resized square
        # matches that of the full image to 52 dB PSNR (median over COCO photographs); at less, to 41 dB.
        image.draft(None, (2 * size, 2 * size))
    return image


def _brand(content: bytes) -> bytes:
    """Return the major brand of an ISO media file, or no bytes for other files."""
    return content[8:12] if content[4:8] == b"ftyp" else b""


def _register_heif() -> bool:
    """Let Pillow read HEIC and HEIF files, and return whether the package for it is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _missing_support(content: bytes) -> str | None:
    """Describe an image file of a known format that this installation cannot read; None for other files."""
    convert = "convert the image to JPEG."
    if _brand(content) in _HEIF_BRANDS:
        if _register_heif():
            return "a damaged HEIC or HEIF image. Replace the file."
        return f"a HEIC or HEIF image, which needs the package pillow-heif. Run `pip install pillow-heif`, or {convert}"
    if _brand(content) in _AVIF_BRANDS:
        return f"an AVIF image, damaged or not supported by this Pillow. Run `pip install -U pillow`, or {convert}"
    if content.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")):
        return "a JPEG XL image, which is not supported. Convert the image to JPEG."
    return None


def _check_memory(image: Image.Image, rotated: bool = False) -> None:
    """Refuse an image that would take too much memory, before it is decoded.

    Raises:
        ValueError: The image has more than `MAX_PIXELS` pixels or needs more than `MAX_DECODED_BYTES`.
    """
    num_pixels = image.width * image.height
    if num_pixels > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} px, more than {MAX_PIXELS // 10**6} million pixels")
    mode = image.mode
    stored = 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4  # Pillow pads RGB to 4 bytes
    flat = 1 if mode == "1" or mode.startswith("I") or (mode == "L" and not image.has_transparency_data) else 4
    num_copies = (not _is_flat(image)) + rotated
    num_bytes = num_pixels * (stored + num_copies * flat + _DECODER_BYTES.get(image.format or "", 0))
    if num_bytes > MAX_DECODED_BYTES:
        raise ValueError(
            f"{image.width} x {image.height} px of mode {mode} need {num_bytes // 10**6} MB, more than"
            f" {MAX_DECODED_BYTES // 10**6} MB"
        )


def _with_end(jpeg: bytes, data: bytes = b"") -> bytes:
    """Append entropy-coded data and the end-of-image marker to a JPEG without one, or with its first byte only."""
    return jpeg.removesuffix(b"\xff") + data + _JPEG_END


def _lacks_only_its_end(jpeg: bytes) -> bool:
    """Whether a JPEG that Pillow cannot load is complete except for its end-of-image marker.

    Then its pixels do not depend on what follows. Those of a truncated file do, since the decoder reads on.
    """
    if not _has_all_scans(jpeg):
        return False
    try:
        digest = _pixel_digest(_with_end(jpeg))
        return all(_pixel_digest(_with_end(jpeg, data)) == digest for data in _JPEG_FILLERS)
    except OSError:
        return False


def _pixel_digest(content: bytes) -> bytes:
    image = _open(content, None)
    _check_memory(image)
    image.load()
    digest = sha256()
    for strip, _ in _strips(image):
        digest.update(strip.tobytes())
    return digest.digest()


def _has_all_scans(content: bytes) -> bool:
    """Whether a JPEG has the last scan of every coefficient (ITU-T T.81, B.2.3); `content` may lack its end."""
    num_components = 0
    progressive = False
    complete: set[tuple[int, int]] = set()  # (component, coefficient) at full precision
    position = 2
    while (position := content.find(b"\xff", position)) >= 0 and position + 4 <= len(content):
        marker = content[position + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:  # not a segment
            position += 1 if marker == 0xFF else 2
            continue
        segment = content[position + 4 : position + 2 + int.from_bytes(content[position + 2 : position + 4])]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(segment) > 5:  # start of frame
            num_components, progressive = segment[5], marker in (0xC2, 0xCA)
        elif marker == 0xDA and len(segment) >= 4 + 2 * segment[0]:  # start of scan
            first, last, precision = segment[1 + 2 * segment[0] :][:3]
            if not progressive:
                first, last, precision = 0, 63, 0
            if precision & 0x0F == 0:
                components = segment[1 : 1 + 2 * segment[0] : 2]
                complete |= {(component, index) for component in components for index in range(first, last + 1)}
        position += 4 + len(segment)
    return len(complete) == 64 * num_components


def _render_view(image: Image.Image, frame: Frame, view: View) -> Pixels:
    """Crop, resize and flip an upright gray or RGB image: uint8 [H, W, 3]."""
    box = view_box(*image.size, view)
    left, top, right, bottom = box or (0, 0, *image.size)
    size = frame.resized(right - left, bottom - top)
    recipe = frame.center_crop
    resampling = Image.Resampling.BILINEAR if recipe and recipe.resampling == "bilinear" else Image.Resampling.BICUBIC
    if size[0] * size[1] > MAX_PIXELS:  # a panorama, of which a center crop needs a small part
        visible = frame.visible_box(*image.size, view)
        return _mirror(_to_rgb(image.resize((frame.width, frame.height), resampling, visible)), view)
    resized = image.resize(size, resampling, box)
    if recipe:
        x, y = frame.center(*size)
        resized = resized.crop((x, y, x + frame.width, y + frame.height))
    return _mirror(_to_rgb(resized), view)


def _mirror(image: Image.Image, view: View) -> Pixels:
    return np.array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped(view) else image)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Cameras write broken EXIF blocks. Ignore them, as image viewers do.
        return 1


def _scale_transparency(image: Image.Image) -> None:
    """Scale the transparent color of an opened PNG as Pillow scales the pixels: to 8 bits."""
    transparency = image.info.get("transparency")
    raw_mode = image.tile[0][3] if isinstance(image, ImageFile.ImageFile) and image.tile else None
    if raw_mode in ("L;2", "L;4") and isinstance(transparency, int):
        image.info["transparency"] = transparency * (85 if raw_mode == "L;2" else 17)
    elif raw_mode == "RGB;16B" and isinstance(transparency, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparency)


def _is_flat(image: Image.Image) -> bool:
    """Whether an image is opaque 8-bit gray or RGB."""
    return image.mode in ("L", "RGB") and not image.has_transparency_data


def _flatten(image: Image.Image) -> Image.Image:
    """Convert an image to opaque 8-bit gray or RGB.

    Raises:
        ValueError: The range of the pixels is unknown.
    """
    if _is_flat(image):
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):
        return _convert_strips(image, "L", _gray16_to_gray8(image))
    if image.has_transparency_data:
        return _convert_strips(image, "RGB", _composite_on_white)
    if image.mode == "1":
        return _convert_strips(image, "L", lambda strip: strip.convert("L"))
    return _convert_strips(image, "RGB", _to_rgb)


def _gray16_to_gray8(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return the conversion of strips of an integer image. Pillow's clips at 255 instead of scaling.

    Raises:
        ValueError: The pixels have more than 16 bits.
    """
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    num_bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    # Pillow scales a PPM of 9 to 16 bits to 16 bits, and stores it and signed TIFFs as 32-bit integers.
    if image.mode == "I" and not (image.format == "PPM" or (tags and num_bits == 16)):
        raise ValueError("32-bit integer pixels, whose range is unknown")
    largest = 2 ** min(num_bits, 16) - 1
    white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    transparency = image.info.get("transparency")

    def convert(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip)
        if values.min() < 0:
            raise ValueError("negative integer pixels, whose range is unknown")
        gray = (values.clip(max=largest).astype(np.uint32) * 255 // largest).astype(np.uint8)
        if white_is_zero:
            gray = 255 - gray
        if isinstance(transparency, int):
            gray[values == transparency] = 255
        return Image.fromarray(gray)

    return convert


def _composite_on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() copies an RGB image


def _convert_strips(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image strip by strip."""
    if image.width * image.height <= _STRIP_PIXELS:
        return convert(image)
    result = Image.new(mode, image.size)
    for strip, top in _strips(image):
        result.paste(convert(strip), (0, top))
    return result


def _strips(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """Cut an image into strips of about `_STRIP_PIXELS`, each with its top row."""
    num_rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, num_rows):
        yield image.crop((0, top, image.width, min(top + num_rows, image.height))), top
