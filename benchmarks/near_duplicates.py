"""Similarity of copies of photographs, and of different photographs, as `encode` compares them.

Columns of the table:

median: similarity of a photograph and its copy.
found: share of the copies that are at least as similar as near-duplicates.

The last row is the most similar pair of different photographs. Needs the photographs in ../shared/real.
"""

import io
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from pipeline.features.encoder import IMAGES_PER_BATCH, encode_batch, optimize_for_inference, read_encoder
from pipeline.features.images import ImageSource, read_image
from pipeline.features.near_duplicates import MIN_SIMILARITY, center_grids

REAL = Path(__file__).parents[2] / "shared/real"
NUM_COPIED = 150
SIZE = 224


def save_jpeg(image: Image.Image, quality: int = 75) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def resize(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((int(image.width * factor), int(image.height * factor)), Image.Resampling.BICUBIC)


def crop(image: Image.Image, fraction: float) -> Image.Image:
    x, y = int(image.width * fraction / 2), int(image.height * fraction / 2)
    return image.crop((x, y, image.width - x, image.height - y))


COPIES: Mapping[str, Callable[[Image.Image], bytes]] = {
    "JPEG of quality 75": save_jpeg,
    "JPEG of quality 50": lambda image: save_jpeg(image, 50),
    "JPEG of quality 30": lambda image: save_jpeg(image, 30),
    "1.5 times as large": lambda image: save_jpeg(resize(image, 1.5)),
    "half as large": lambda image: save_jpeg(resize(image, 0.5)),
    "20% brighter": lambda image: save_jpeg(ImageEnhance.Brightness(image).enhance(1.2)),
    "gray": lambda image: save_jpeg(ImageOps.grayscale(image).convert("RGB")),
    "5% cut off": lambda image: save_jpeg(crop(image, 0.05)),
    "10% cut off": lambda image: save_jpeg(crop(image, 0.1)),
    "mirrored": lambda image: save_jpeg(ImageOps.mirror(image)),
}


def main() -> None:
    """Print a row for each kind of copy."""
    photos = [path for name in ("flickr", "coco") for path in sorted((REAL / name / "images").glob("*.jpg"))]
    if not photos:
        print(f"near_duplicates: skipped, since {REAL} has no photographs")
        return
    encoder = read_encoder(REAL / "weights/resnet18-imagenet-to-layer3.pth", "resnet18", "layer3")
    network = optimize_for_inference(encoder, "float32", False, torch.device("cpu"))

    def encode(sources: list[ImageSource]) -> torch.Tensor:
        batches = (sources[start : start + IMAGES_PER_BATCH] for start in range(0, len(sources), IMAGES_PER_BATCH))
        grids = [encode_batch(network, np.stack([read_image(source, SIZE) for source in batch])) for batch in batches]
        return torch.from_numpy(np.concatenate(grids)).float()

    grids = encode(list(photos))
    mean = grids.mean(dim=0)
    unit = center_grids(grids, mean)
    copied = random.Random(0).sample(range(len(photos)), NUM_COPIED)
    print(f"similarity of {NUM_COPIED} photographs and their copies, resnet18 up to layer3, {SIZE} px")
    print(f"{'':<22} {'median':>7} {'found':>6}")
    for name, copy in COPIES.items():
        copies = center_grids(encode([copy(Image.open(photos[index]).convert("RGB")) for index in copied]), mean)
        values = (copies * unit[copied]).sum(dim=1).tolist()
        found = sum(value >= MIN_SIMILARITY for value in values) / len(values)
        print(f"{name:<22} {median(values):>7.2f} {found:>6.0%}", flush=True)
    different = (unit @ unit.T).fill_diagonal_(-1).max()
    print(f"most similar of {len(photos)} photographs: {different:.2f}")
