"""Images of one color, which the fixture `tiny` was trained to name."""

import io

from PIL import Image

from tests.tiny_captioner import COLORS


def solid_image(color: str = "red", size: tuple[int, int] = (28, 20)) -> Image.Image:
    return Image.new("RGB", size, COLORS[color])


def png_bytes(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()
