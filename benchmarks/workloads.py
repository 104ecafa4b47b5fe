"""Images, records, weights and models for benchmarks."""

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
from pipeline.decoder.decoder import DecoderKind, DecoderParams
from pipeline.decoder.model_io import ModelConfig, TrainingData, write_model
from pipeline.decoder.registry import build_decoder
from pipeline.features.encoder import EncodeParams, Precision
from pipeline.features.resnets import Architecture, Layer
from pipeline.features.store import EncoderSpec

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "real" / "coco" / "images"


def write_photographs(folder: Path, num_images: int) -> tuple[list[Record], str]:
    """Write photographs of COCO to a folder, or random images if `PHOTOGRAPHS` has none.

    Photographs are repeated to get enough files. Each copy has different bytes after the end of the image, which image
    decoders ignore, because the stage encodes equal files only once.

    Returns:
        The records of the images, and a description of the files.
    """
    files = [path.read_bytes() for path in sorted(PHOTOGRAPHS.glob("*.jpg"))[:num_images]]
    description = "photographs of COCO" if files else "random images of 640 x 480 px"
    files = files or [random_jpeg(seed, 640, 480) for seed in range(min(num_images, 80))]
    for i in range(num_images):
        (folder / f"{i}.jpg").write_bytes(files[i % len(files)] + i.to_bytes(8))
    return make_records(num_images), f"copies of {len(files)} {description}"


def random_jpeg(seed: int, width: int, height: int) -> bytes:
    """Make a JPEG of smooth colors with noise like a photograph's grain."""
    rng = np.random.default_rng(seed)
    coarse: npt.NDArray[np.uint8] = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = rng.standard_normal(smooth.shape, dtype=np.float32) * 6
    file = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_records(num_images: int) -> list[Record]:
    """Make records of the images `0.jpg`, `1.jpg` and so on."""
    return [Record(image_id=i, file=f"{i}.jpg", split="train", captions=("an image",)) for i in range(num_images)]


def encode_params(
    architecture: Architecture,
    layer: Layer,
    weights: Path,
    image_size: int,
    precision: Precision = "float32",
    compiled: bool = False,
) -> EncodeParams:
    """Return params of the stage `encode` for whole images."""
    return EncodeParams(
        architecture=architecture,
        layer=layer,
        weights=weights,
        image_size=image_size,
        resize="squash",
        pool=None,
        precision=precision,
        compile=compiled,
        views=("whole",),
    )


def save_random_weights(architecture: str, path: Path) -> nn.Module:
    """Save a ResNet with random weights, and return it in eval mode.

    One forward pass in train mode sets the running statistics of the batch norms, as training does. Without it the
    features of a deep ResNet exceed the range of float16.
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
    """Return the file of ImageNet weights of a ResNet up to a layer, or None if shared/real has none."""
    path = PHOTOGRAPHS.parents[1] / "weights" / f"{architecture}-imagenet-to-{layer}.pth"
    return path if path.is_file() else None


def decoder_params(
    embedding_size: int,
    hidden_size: int,
    attention_size: int,
    dropout: float = 0.0,
    kind: DecoderKind = "soft_attention",
) -> DecoderParams:
    """Return params of a decoder without non-local block, region dropout and word dropout."""
    return DecoderParams(
        kind=kind,
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        attention_size=attention_size,
        non_local_size=0,
        dropout=dropout,
        region_dropout=0.0,
        word_dropout=0.0,
    )


def make_vocabulary(num_words: int) -> Vocabulary:
    """Make a vocabulary of the words `word0`, `word1` and so on."""
    return Vocabulary((*SPECIALS, *(f"word{i}" for i in range(num_words))))


def save_random_model(
    folder: Path, params: DecoderParams, spec: EncoderSpec, vocabulary: Vocabulary, encoder_weights: str | None = None
) -> Path:
    """Save a model folder with random weights, whose captions rarely end before the maximum length.

    Args:
        folder: The folder to write.
        params: Kind and sizes of the decoder.
        spec: Encoder of the grids.
        vocabulary: Vocabulary of the decoder.
        encoder_weights: Path of the encoder's weights that the model records.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    decoder = build_decoder(params, spec.grid, spec.channels, len(vocabulary))
    config = ModelConfig(
        fingerprint="random",
        decoder=params,
        vocabulary_digest=vocabulary.digest,
        encoder=spec,
        encoder_fingerprint=spec.fingerprint,
        view="whole",
        data=TrainingData(num_images=0, num_captions=0, num_val_images=0, num_text_captions=0),
        epoch=1,
        selected_by="nothing",
        versions={},
        encoder_weights=encoder_weights,
    )
    write_model(folder, decoder.state_dict(), vocabulary, config)
    return folder
