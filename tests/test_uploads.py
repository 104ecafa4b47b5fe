import io

import pytest
from PIL import ExifTags, Image

pytest.importorskip("streamlit", reason="needs Streamlit: pip install 'gridcap[app]'")

from pipeline.app.uploads import MAX_BYTES, PREVIEW_SIZE, ImageFile, check_image, make_preview
from pipeline.errors import UserError
from pipeline.features.views import Frame
from tests.image_files import encode_image, encode_jpeg, png_bomb, red_blue_image

FRAME = Frame(height=32, width=32)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_preview_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    preview = make_preview(
        ImageFile(name="a.jpg", content=encode_jpeg(red_blue_image(300, 200), exif=exif)), FRAME, "whole"
    )
    assert (preview.width > preview.height) == (orientation < 5)
    assert max(preview.width, preview.height) == PREVIEW_SIZE
    with Image.open(io.BytesIO(preview.jpeg)) as image:
        assert image.size == (preview.width, preview.height)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_supported_formats_are_accepted(image_format: str) -> None:
    check_image(ImageFile(name="a", content=encode_image(red_blue_image(3, 2), image_format)))


def test_large_file_is_rejected() -> None:
    with pytest.raises(UserError) as error:
        check_image(ImageFile(name="a.jpg", content=bytes(MAX_BYTES + 1)))
    assert str(error.value).startswith("a.jpg: ")
    assert "20 MB" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        encode_image(red_blue_image(3, 2), "PPM"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would start Ghostscript
        b"\xff\xd8\xff\xe0 and no more",
        b"",
    ],
    ids=["ppm", "postscript", "broken", "empty"],
)
def test_other_formats_are_rejected(content: bytes) -> None:
    with pytest.raises(UserError) as error:
        check_image(ImageFile(name="a.jpg", content=content))
    assert str(error.value).startswith("a.jpg: ")
    assert "JPEG, PNG, WEBP, GIF, BMP or TIFF" in str(error.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as `gridcap` ignores it
def test_decompression_bomb_is_rejected() -> None:
    bomb = ImageFile(name="bomb.png", content=png_bomb(10_000, 10_000))
    check_image(bomb)  # does not decode it
    with pytest.raises(UserError) as error:
        make_preview(bomb, FRAME, "whole")
    assert str(error.value).startswith("bomb.png: ")
    assert "10000 x 10000" in str(error.value)
