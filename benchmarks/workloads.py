"""Pictures, records and weights to measure encoding on."""

import io
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pipeline.captions.records import Record
from pipeline.captions.vocabulary import SPECIALS, Vocabulary
from pipeline.decoder.model_io import ModelConfig, TrainingData, write_model
from pipeline.decoder.soft_attention import DecoderParams, SoftAttentionDecoder
from pipeline.features.store import EncoderSpec

REAL = Path(__file__).parents[2] / "shared" / "real" / "coco" / "images"


def photographs(folder: Path, count: int) -> tuple[list[Record], str]:
    """Put `count` photographs into a folder; gives their records and what they are.

    They are those of COCO below `REAL`, or painted where there are none. They come up again and again, each time with
    other bytes after the end of the picture, which decoders ignore: the stage encodes equal files only once.
    """
    files = [path.read_bytes() for path in sorted(REAL.glob("*.jpg"))[:count]]
    told = "photographs of COCO" if files else "painted pictures of 640 x 480 px"
    files = files or [painted(seed, 640, 480) for seed in range(min(count, 80))]
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(files[number % len(files)] + number.to_bytes(8))
    return records(count), f"copies of {len(files)} {told}"


def painted(seed: int, width: int, height: int) -> bytes:
    """A JPEG of smooth colors under a photograph's grain."""
    rng = np.random.default_rng(seed)
    coarse: npt.NDArray[np.uint8] = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = rng.standard_normal(smooth.shape, dtype=np.float32) * 6
    file = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def records(count: int) -> list[Record]:
    """Records of the pictures `0.jpg`, `1.jpg` and so on."""
    return [
        Record(image_id=number, file=f"{number}.jpg", split="train", captions=("a picture",)) for number in range(count)
    ]


def save_weights(architecture: str, path: Path) -> nn.Module:
    """Save a ResNet with random weights, and give it, in eval mode.

    One pass in training mode makes each batch norm fit what it meets, as in a trained network; the numbers in a deep
    one would leave the range of float16 otherwise.
    """
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.get_model(
        architecture, weights=None, norm_layer=partial(nn.BatchNorm2d, momentum=1.0)
    )
    with torch.no_grad():
        network(torch.randn(16, 3, 64, 64))
    save_file(network.state_dict(), path)
    return network.eval()


def real_weights(architecture: str, layer: str) -> Path | None:
    """ImageNet's weights of a ResNet up to a layer, where shared/real has them."""
    path = REAL.parents[1] / "weights" / f"{architecture}-imagenet-to-{layer}.pth"
    return path if path.is_file() else None


def save_model(
    folder: Path, sizes: DecoderParams, spec: EncoderSpec, words: int, encoder_weights: str | None = None
) -> Path:
    """Save a model folder with random weights, for the grids of an encoder setting; its captions seldom end."""
    vocabulary = Vocabulary((*SPECIALS, *(f"word{number}" for number in range(words))))
    torch.manual_seed(0)
    decoder = SoftAttentionDecoder(sizes, spec.grid, spec.channels, len(vocabulary))
    config = ModelConfig(
        fingerprint="random",
        decoder=sizes,
        vocabulary_digest=vocabulary.digest,
        encoder=spec,
        encoder_fingerprint=spec.fingerprint,
        view="whole",
        data=TrainingData(num_images=0, num_captions=0, num_val_images=0),
        epoch=0,
        selected_by="nothing",
        versions={},
        encoder_weights=encoder_weights,
    )
    write_model(folder, decoder.state_dict(), vocabulary, config)
    return folder
