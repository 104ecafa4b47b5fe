"""Image files as bytes."""

import io
import struct
import zlib
from typing import Any

from PIL import Image


def encode_image(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def encode_jpeg(image: Image.Image, **options: Any) -> bytes:
    return encode_image(image, "JPEG", **options)


def red_blue_image(width: int, height: int) -> Image.Image:
    """Draw an image whose left half is red and whose right half is blue."""
    image = Image.new("RGB", (width, height), (220, 30, 30))
    image.paste((30, 30, 220), (width // 2, 0, width, height))
    return image


def png_bomb(width: int, height: int) -> bytes:
    """Make a small PNG file whose header claims a large image."""
    content = bytearray(encode_image(Image.new("1", (8, 8)), "PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def png(width: int, height: int, bit_depth: int, color_type: int, row: bytes, transparent: bytes = b"") -> bytes:
    """Make a PNG file of equal rows, with the content of the tRNS chunk if there is one."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress((b"\0" + row) * height)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
        if content or name == b"IEND"
    )
