import io
import re
import struct
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, TiffImagePlugin

from pipeline.errors import UserError
from pipeline.features.images import (
    MAX_DECODED_BYTES,
    MAX_PIXELS,
    normalize,
    read_image,
    read_views,
    read_visible,
    upright_size,
)
from pipeline.features.resnets import IMAGENET
from pipeline.features.views import Frame
from tests.image_files import encode_image, png, png_bomb
from tests.paths import REAL

LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(width: int = 64, height: int = 32) -> Image.Image:
    """Draw an image with red and green quarters above blue and white quarters."""
    image = Image.new("RGB", (2, 2))
    for position, color in zip([(0, 0), (1, 0), (0, 1), (1, 1)], [RED, GREEN, BLUE, WHITE], strict=True):
        image.putpixel(position, color)
    return image.resize((width, height), Image.Resampling.NEAREST)


def quarter_colors(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """Return the color at the center of each quarter."""
    low, high = len(pixels) // 4, 3 * len(pixels) // 4
    return [tuple(pixels[position].tolist()) for position in [(low, low), (low, high), (high, low), (high, high)]]


def test_the_whole_image_fills_the_square(tmp_path):
    quarters(90, 30).save(tmp_path / "wide.png")

    pixels = read_image(tmp_path / "wide.png", 32)

    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert quarter_colors(pixels) == [RED, GREEN, BLUE, WHITE]


def test_read_visible_keeps_the_aspect_ratio():
    pixels = read_visible(encode_image(quarters(90, 30)), 60, Frame(height=32, width=32), "whole")

    assert pixels.shape == (20, 60, 3)
    assert tuple(pixels[5, 15]) == RED
    assert tuple(pixels[15, 45]) == WHITE


def test_views_are_crops_and_flips():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, :8] = 255  # the leftmost eighth, which is outside the crops at the right

    pixels = read_views(
        encode_image(Image.fromarray(stripes)),
        Frame(height=56, width=56),
        ("whole_flipped", "top_left", "bottom_right", "center"),
    )

    assert (pixels[0, :, -4:] == 255).all()
    assert (pixels[1, :, :4] == 255).all()
    assert (pixels[2] == 0).all()
    assert (pixels[3, :, 0] == 255).all()
    assert (pixels[3, :, 8:] == 0).all()


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, [RED, GREEN, BLUE, WHITE]),
        (2, [GREEN, RED, WHITE, BLUE]),
        (3, [WHITE, BLUE, GREEN, RED]),
        (4, [BLUE, WHITE, RED, GREEN]),
        (5, [RED, BLUE, GREEN, WHITE]),
        (6, [BLUE, RED, WHITE, GREEN]),
        (7, [WHITE, GREEN, BLUE, RED]),
        (8, [GREEN, WHITE, RED, BLUE]),
        (9, [RED, GREEN, BLUE, WHITE]),
    ],
)
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(tmp_path, orientation, expected, image_format):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a.{image_format.lower()}"
    image = quarters().resize((32, 16), Image.Resampling.NEAREST)
    image.save(path, image_format, exif=exif, **LOSSLESS[image_format])

    assert quarter_colors(read_image(path, 32)) == expected
    assert upright_size(path) == ((16, 32) if orientation in range(5, 9) else (32, 16))


def test_broken_exif_is_ignored():
    content = encode_image(quarters(), exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\xff")

    assert quarter_colors(read_image(content, 32)) == [RED, GREEN, BLUE, WHITE]


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (8, 8), (*RED, 0))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    gray = Image.new("LA", (8, 8), (0, 0))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*BLUE, *RED])
    color_key = Image.new("RGB", (8, 8), RED)

    assert (read_image(encode_image(clear), 4) == 255).all()
    assert (read_image(encode_image(half), 4) == 127).all()
    assert (read_image(encode_image(gray), 4) == 255).all()
    assert (read_image(encode_image(palette, transparency=1), 4) == 255).all()
    assert (read_image(encode_image(palette, transparency=b"\xff\x00"), 4) == 255).all()
    assert (read_image(encode_image(palette, transparency=0), 4) == RED).all()
    assert (read_image(encode_image(color_key, transparency=RED), 4) == 255).all()


def test_every_color_mode_becomes_rgb():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*RED, *BLUE])
    gray16 = Image.fromarray(np.full((8, 8), 0x8080, dtype=np.uint16))
    cmyk = encode_image(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")

    assert (read_image(encode_image(Image.new("1", (8, 8), 1)), 4) == 255).all()
    assert (read_image(encode_image(Image.new("L", (8, 8), 99)), 4) == 99).all()
    assert (read_image(encode_image(palette), 4) == BLUE).all()
    assert (read_image(encode_image(palette, "GIF"), 4) == BLUE).all()
    assert (read_image(encode_image(gray16), 4) == 128).all()
    assert (read_image(encode_image(gray16, "TIFF"), 4) == 128).all()
    assert (read_image(cmyk, 4) == RED).all()
    with pytest.raises(UserError, match=r"float\.tif: .*floating-point"):
        read_image(encode_image(Image.new("F", (8, 8), 0.5), "TIFF"), 4, "float.tif")


def test_transparency_of_every_bit_depth_becomes_white():
    """Pillow scales pixels of 2, 4 and 16 bits per channel to 8 bits, but not the transparent color."""
    for content in (
        png(1, 1, 16, 0, b"\x12\x34", transparent=b"\x12\x34"),
        png(1, 1, 8, 0, b"\x12", transparent=b"\x00\x12"),
        png(1, 1, 4, 0, b"\x50", transparent=b"\x00\x05"),
        png(1, 1, 2, 0, b"\x40", transparent=b"\x00\x01"),
        png(1, 1, 1, 0, b"\x00", transparent=b"\x00\x00"),
        png(1, 1, 16, 2, b"\x12\x34\x80\x80\x20\x21", transparent=b"\x12\x34\x80\x80\x20\x21"),
        png(1, 1, 16, 4, b"\x12\x34\x00\x00"),
    ):
        assert (read_image(content, 4) == 255).all()
    assert (read_image(png(1, 1, 16, 0, b"\x12\x35", transparent=b"\x12\x34"), 4) == 0x12).all()
    assert (read_image(png(1, 1, 4, 0, b"\x50", transparent=b"\x00\x06"), 4) == 85).all()


def test_integer_images_are_scaled_or_refused():
    """Pillow clips them at 255, so they would be nearly black or white."""
    little_endian = Image.fromarray(np.full((8, 8), 0x8080, dtype=np.uint16))
    inverted = encode_image(little_endian, "TIFF", tiffinfo={TiffImagePlugin.PHOTOMETRIC_INTERPRETATION: 0})
    twelve_bits = bytearray(encode_image(Image.new("L", (8, 12), 0x88), "TIFF"))
    pgm = b"P5 1 1 1023\n\x02\x01"

    assert (read_image(inverted, 4) == 127).all()
    assert (read_image(as_12_bits(twelve_bits), 4) == 0x88).all()
    assert (read_image(pgm, 4) == 127).all()
    for value in (-1, 0, 200, 70_000, 2**31 - 1):
        image = Image.fromarray(np.full((8, 8), value, dtype=np.int32))
        for source in (image, encode_image(image, "TIFF")):
            with pytest.raises(UserError, match=r"a\.tif: .*32-bit integer"):
                read_image(source, 4, "a.tif")


def as_12_bits(content: bytearray) -> bytes:
    """Turn an 8-bit TIFF of 8 x 12 pixels into one of 12 bits per pixel and 8 x 8 pixels, with the same bytes."""
    with Image.open(io.BytesIO(content)) as image:
        assert image.tag_v2[TiffImagePlugin.ROWSPERSTRIP] == 12
    [directory] = struct.unpack_from("<I", content, 4)
    for entry in range(directory + 2, directory + 2 + 12 * content[directory], 12):
        tag = int.from_bytes(content[entry : entry + 2], "little")
        new_values = {
            TiffImagePlugin.IMAGELENGTH: 8,
            TiffImagePlugin.ROWSPERSTRIP: 8,
            TiffImagePlugin.BITSPERSAMPLE: 12,
        }
        if tag in new_values:
            content[entry + 8] = new_values[tag]
    return bytes(content)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_conversion_in_strips_and_in_gray_equals_that_of_the_whole_rgb_image(monkeypatch, mode):
    noise = np.random.default_rng(0).integers(0, 256, (37, 23, 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA" if mode in ("RGBA", "LA") else "CMYK").convert(
        "RGB" if mode == "P" else mode if mode not in ("1", "I;16") else "L"
    )
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    elif mode in ("1", "P"):
        image = image.convert(mode)
    white = Image.new("RGBA", image.size, "white")
    rgb = Image.fromarray((np.asarray(image) // 257).astype(np.uint8)) if mode == "I;16" else image
    rgb = Image.alpha_composite(white, rgb.convert("RGBA")).convert("RGB") if "A" in mode else rgb.convert("RGB")
    monkeypatch.setattr("pipeline.features.images._STRIP_PIXELS", 50)

    np.testing.assert_array_equal(read_image(image, 16), np.asarray(rgb.resize((16, 16), Image.Resampling.BICUBIC)))


def test_only_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]

    assert (read_image(encode_image(frames[0], "GIF", save_all=True, append_images=frames[1:]), 4) == RED).all()


def test_a_large_jpeg_decoded_at_reduced_resolution_looks_the_same():
    ramp = np.linspace(0, 255, 512)
    waves = 127 + 120 * np.sin(np.arange(512) / 9)
    scene = np.stack([np.add.outer(ramp, waves) / 2, np.add.outer(waves, ramp) / 2, np.outer(ramp, ramp) / 255], -1)
    content = encode_image(Image.fromarray(scene.astype(np.uint8)), "JPEG", quality=95)
    full = Image.open(io.BytesIO(content)).resize((64, 64), Image.Resampling.BICUBIC)

    difference = np.abs(read_image(content, 64).astype(int) - np.asarray(full).astype(int))

    assert 0 < difference.max() <= 8
    assert difference.mean() < 0.6


def test_downscaling_averages_pixels():
    checkerboard = np.indices((64, 64)).sum(0) % 2 * 255

    pixels = read_image(encode_image(Image.fromarray(checkerboard.astype(np.uint8))), 8)

    assert np.abs(pixels.astype(int) - 127).max() <= 3


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"<html>not found</html>", encode_image(quarters())[:60]])
def test_a_file_that_is_not_an_image_is_an_error(tmp_path, content):
    path = tmp_path / "7.jpg"
    path.write_bytes(content)

    with pytest.raises(UserError) as error:
        read_image(path, 32)

    assert str(error.value).startswith(f"{path}: ")
    assert "not a supported image format" in str(error.value) or "cannot be read as an image" in str(error.value)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"8\.jpg: .*No such file"):
        read_image(tmp_path / "8.jpg", 32)


def test_a_truncated_photograph_is_an_error():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encode_image(Image.fromarray(noise), "JPEG")

    with pytest.raises(UserError, match=r"cut\.jpg: .*truncated"):
        read_image(content[: len(content) // 2], 32, "cut.jpg")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}])
def test_a_jpeg_that_lacks_only_its_end_marker_is_read(options):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 48, 3), dtype=np.uint8))
    content = encode_image(image, "JPEG", **options)
    expected = read_image(content, 32)

    for num_bytes in (1, 2):
        np.testing.assert_array_equal(read_image(content[:-num_bytes], 32), expected)
    scans = [match.start() for match in re.finditer(b"\xff\xda", content)]
    for end in (*scans, *(len(content) - num_bytes for num_bytes in (3, 4, 6, 10, 50, 500))):
        with pytest.raises(UserError, match="cannot be read as an image"):
            read_image(content[:end], 32)


def test_the_orientation_of_a_jpeg_without_its_end_marker_is_applied():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    content = encode_image(quarters(), "JPEG", exif=exif, quality=100, subsampling=0)

    np.testing.assert_allclose(quarter_colors(read_image(content[:-2], 32)), [WHITE, BLUE, GREEN, RED], atol=4)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", ["HEIC", "JPEG"]),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", ["HEIF", "JPEG"]),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif", ["AVIF", "JPEG"]),
        (b"\xff\x0a\x00\x00", ["JPEG XL"]),
    ],
)
@pytest.mark.filterwarnings("ignore:AVIF support not installed")
def test_formats_that_pillow_cannot_read_are_named(monkeypatch, content, facts):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)

    with pytest.raises(UserError) as error:
        read_image(content, 32, "IMG_0001.HEIC")

    assert str(error.value).startswith("IMG_0001.HEIC: ")
    assert all(fact in str(error.value) for fact in facts)
    assert "not a supported image format" not in str(error.value)


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif: pip install 'gridcap[heif]'")
    path = tmp_path / "IMG_0001.HEIC"
    pillow_heif.from_pillow(quarters()).save(path, format="HEIF", quality=-1, chroma=444)

    assert upright_size(path) == (64, 32)
    np.testing.assert_allclose(quarter_colors(read_image(path, 32)), [RED, GREEN, BLUE, WHITE], atol=8)


def test_memory_is_bounded_before_an_image_is_decoded(monkeypatch):
    """Each limit is the number of bytes per pixel of the decoded image, its copies and the buffers of its decoder."""
    pixels = 8 * 8
    rotated = Image.Exif()
    rotated[ExifTags.Base.Orientation] = 6
    contents = {
        1: encode_image(Image.new("L", (8, 8))),
        2: encode_image(Image.new("1", (8, 8))),
        3: encode_image(Image.fromarray(np.zeros((8, 8), dtype=np.uint16))),
        4: encode_image(Image.new("RGB", (8, 8))),
        5: encode_image(Image.new("P", (8, 8))),
        8: encode_image(Image.new("RGBA", (8, 8))),
        12: encode_image(Image.new("RGBA", (8, 8)), exif=rotated),
        16: encode_image(Image.new("RGB", (8, 8)), "WEBP"),
    }
    for bytes_per_pixel, content in contents.items():
        monkeypatch.setattr("pipeline.features.images.MAX_DECODED_BYTES", bytes_per_pixel * pixels)
        assert read_image(content, 4).shape == (4, 4, 3)
        monkeypatch.setattr("pipeline.features.images.MAX_DECODED_BYTES", bytes_per_pixel * pixels - 1)
        with pytest.raises(UserError, match=r"large\.png: .*8 x 8 px .*MB"):
            read_image(content, 4, "large.png")


def test_an_rgb_image_of_the_most_pixels_fits_the_memory_bound():
    assert 4 * MAX_PIXELS <= MAX_DECODED_BYTES


def test_a_decompression_bomb_is_an_error():
    side = int(MAX_PIXELS**0.5) + 1

    with pytest.raises(UserError, match=r"bomb\.png: .*80 million"):
        read_image(png_bomb(side, side), 32, "bomb.png")


@settings(max_examples=150)
@given(
    image_format=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    kept_fraction=st.floats(0, 1),
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_file_is_read_or_is_a_user_error(image_format, edits, kept_fraction):
    content = bytearray(encode_image(quarters(16, 16), image_format))
    for position, value in edits:
        content[int(position * len(content))] = value
    with suppress(UserError):
        assert read_image(bytes(content[: int(kept_fraction * len(content)) + 1]), 8).shape == (8, 8, 3)


def test_normalize_matches_imagenet_statistics():
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    images[1] = 255

    normalized = normalize(images, IMAGENET)

    assert normalized.shape == (2, 3, 4, 4)
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalized[0, :, 0, 0], torch.tensor([-2.1179, -2.0357, -1.8044]), rtol=0, atol=1e-4)
    torch.testing.assert_close(normalized[1, :, 3, 3], torch.tensor([2.2489, 2.4286, 2.6400]), rtol=0, atol=1e-4)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real photographs in ../shared/real")
def test_real_photographs_are_read():
    files = [
        *sorted((REAL / "coco" / "images").glob("*.jpg"))[:8],
        *sorted((REAL / "flickr" / "images").glob("*"))[:8],
    ]

    images = [read_image(file, 224) for file in files]

    assert {image.shape for image in images} == {(224, 224, 3)}
    assert min(image.std() for image in images) > 10
