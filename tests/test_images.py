import io
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from pipeline.errors import UserError
from pipeline.features.images import MAX_PIXELS, normalize, read_image, read_upright, read_views, upright_size
from tests.image_files import encode_image, png_bomb
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


def test_read_upright_keeps_the_aspect_ratio():
    pixels = read_upright(encode_image(quarters(90, 30)), 60)

    assert pixels.shape == (20, 60, 3)
    assert tuple(pixels[5, 15]) == RED
    assert tuple(pixels[15, 45]) == WHITE


def test_views_are_crops_and_flips():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, :8] = 255  # the leftmost eighth, which is outside the crops at the right

    pixels = read_views(
        encode_image(Image.fromarray(stripes)), 56, ("whole_flipped", "top_left", "bottom_right", "center")
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


def test_a_decompression_bomb_is_an_error():
    side = int(MAX_PIXELS**0.5) + 1

    with pytest.raises(UserError, match=r"bomb\.png: .*80 million"):
        read_image(png_bomb(side, side), 32, "bomb.png")


@settings(max_examples=150, deadline=None)
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

    normalized = normalize(images)

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
