import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from pipeline.errors import UserError
from pipeline.features.images import MAX_PIXELS, normalize, read_image, upright_size

REAL = Path(__file__).parents[2] / "shared" / "real"

LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(width: int = 64, height: int = 32) -> Image.Image:
    """Red, green / blue, white."""
    image = Image.new("RGB", (2, 2))
    for place, color in zip([(0, 0), (1, 0), (0, 1), (1, 1)], [RED, GREEN, BLUE, WHITE], strict=True):
        image.putpixel(place, color)
    return image.resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corners(pixels: np.ndarray) -> list[tuple[int, ...]]:
    side = len(pixels)
    near, far = side // 4, 3 * side // 4
    return [tuple(pixels[place].tolist()) for place in [(near, near), (near, far), (far, near), (far, far)]]


def test_the_whole_picture_fills_the_square(tmp_path):
    quarters(90, 30).save(tmp_path / "wide.png")

    pixels = read_image(tmp_path / "wide.png", 32)

    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert corners(pixels) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(
    ("orientation", "seen"),
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
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(tmp_path, orientation, seen, kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a.{kind.lower()}"
    quarters().resize((32, 16), Image.Resampling.NEAREST).save(path, kind, exif=exif, **LOSSLESS[kind])

    assert corners(read_image(path, 32)) == seen
    assert upright_size(path) == ((16, 32) if orientation in range(5, 9) else (32, 16))


def test_a_broken_exif_block_does_not_hide_the_picture():
    file = encoded(quarters(), exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\xff")

    assert corners(read_image(file, 32)) == [RED, GREEN, BLUE, WHITE]


def test_transparency_shows_white():
    clear = Image.new("RGBA", (8, 8), (*RED, 0))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    gray = Image.new("LA", (8, 8), (0, 0))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*BLUE, *RED])
    keyed = Image.new("RGB", (8, 8), RED)

    assert (read_image(encoded(clear), 4) == 255).all()
    assert (read_image(encoded(half), 4) == 127).all()
    assert (read_image(encoded(gray), 4) == 255).all()
    assert (read_image(encoded(palette, transparency=1), 4) == 255).all()
    assert (read_image(encoded(palette, transparency=b"\xff\x00"), 4) == 255).all()
    assert (read_image(encoded(palette, transparency=0), 4) == RED).all()
    assert (read_image(encoded(keyed, transparency=RED), 4) == 255).all()


def test_every_color_mode_becomes_rgb():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*RED, *BLUE])
    deep = Image.fromarray(np.full((8, 8), 0x8080, dtype=np.uint16))
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")

    assert (read_image(encoded(Image.new("1", (8, 8), 1)), 4) == 255).all()
    assert (read_image(encoded(Image.new("L", (8, 8), 99)), 4) == 99).all()
    assert (read_image(encoded(palette), 4) == BLUE).all()
    assert (read_image(encoded(palette, "GIF"), 4) == BLUE).all()
    assert (read_image(encoded(deep), 4) == 128).all()
    assert (read_image(encoded(deep, "TIFF"), 4) == 128).all()
    assert (read_image(cmyk, 4) == RED).all()
    with pytest.raises(UserError, match=r"float\.tif: .*floating-point"):
        read_image(encoded(Image.new("F", (8, 8), 0.5), "TIFF"), 4, "float.tif")


def test_the_first_frame_stands_for_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]

    assert (read_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 4) == RED).all()


def test_a_large_jpeg_decoded_at_reduced_scale_looks_the_same():
    ramp = np.linspace(0, 255, 512)
    waves = 127 + 120 * np.sin(np.arange(512) / 9)
    scene = np.stack([np.add.outer(ramp, waves) / 2, np.add.outer(waves, ramp) / 2, np.outer(ramp, ramp) / 255], -1)
    file = encoded(Image.fromarray(scene.astype(np.uint8)), "JPEG", quality=95)
    whole = Image.open(io.BytesIO(file)).resize((64, 64), Image.Resampling.BICUBIC)

    difference = np.abs(read_image(file, 64).astype(int) - np.asarray(whole).astype(int))

    assert 0 < difference.max() <= 8
    assert difference.mean() < 0.6


def test_reducing_averages_instead_of_picking_pixels():
    checked = np.indices((64, 64)).sum(0) % 2 * 255

    pixels = read_image(encoded(Image.fromarray(checked.astype(np.uint8))), 8)

    assert np.abs(pixels.astype(int) - 127).max() <= 3


@pytest.mark.parametrize("file", [b"", b"GIF89a", b"<html>not found</html>", encoded(quarters())[:60]])
def test_what_is_no_picture_is_named(tmp_path, file):
    (tmp_path / "7.jpg").write_bytes(file)

    with pytest.raises(UserError, match=r"7\.jpg: cannot be read as a picture"):
        read_image(tmp_path / "7.jpg", 32)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"8\.jpg: cannot be read \(No such file"):
        read_image(tmp_path / "8.jpg", 32)


def test_a_truncated_photograph_is_named_and_not_filled_with_grey():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = encoded(Image.fromarray(noise), "JPEG")

    with pytest.raises(UserError, match=r"cut\.jpg: .*truncated"):
        read_image(file[: len(file) // 2], 32, "cut.jpg")


def test_a_small_file_that_claims_a_huge_picture_is_refused():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    side = int(MAX_PIXELS**0.5) + 1
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")

    with pytest.raises(UserError, match=r"bomb\.png: .* more than 80 million"):
        read_image(bomb, 32, "bomb.png")


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    kept=st.floats(0, 1),
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_file_is_read_or_named(kind, edits, kept):
    file = bytearray(encoded(quarters(16, 16), kind))
    for place, value in edits:
        file[int(place * len(file))] = value
    with suppress(UserError):
        assert read_image(bytes(file[: int(kept * len(file)) + 1]), 8).shape == (8, 8, 3)


def test_normalize_gives_imagenet_units():
    pictures = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    pictures[1] = 255

    images = normalize(pictures)

    assert images.shape == (2, 3, 4, 4)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([-2.1179, -2.0357, -1.8044]), rtol=0, atol=1e-4)
    torch.testing.assert_close(images[1, :, 3, 3], torch.tensor([2.2489, 2.4286, 2.6400]), rtol=0, atol=1e-4)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real photographs of ../shared/real are absent")
def test_real_photographs_are_read():
    files = [
        *sorted((REAL / "coco" / "images").glob("*.jpg"))[:8],
        *sorted((REAL / "flickr" / "images").glob("*"))[:8],
    ]

    pictures = [read_image(file, 224) for file in files]

    assert {picture.shape for picture in pictures} == {(224, 224, 3)}
    assert min(picture.std() for picture in pictures) > 10
