"""Images of a single color, which the fixture `tiny` is trained to caption."""

from PIL import Image

from tests.tiny_captioner import COLORS


def solid_image(color: str = "red", size: tuple[int, int] = (28, 20)) -> Image.Image:
    return Image.new("RGB", size, COLORS[color])
