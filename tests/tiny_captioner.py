"""A captioner small enough to train in a test, on images of a single color, by the functions of the stages."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from pipeline.artifacts import publish
from pipeline.captions.records import Record, Split
from pipeline.decoder.model_io import record_provenance
from pipeline.features.encoding import encode
from tests.factories import decoder_params, encode_params, lr_params, train_params
from tests.tiny_dataset import train_tiny, write_token_files

COLORS = {"red": (220, 30, 30), "blue": (40, 50, 230), "white": (245, 245, 245)}

TRAINING = train_params(
    seed=1,
    decoder=decoder_params(hidden_size=16),
    batch_size=8,
    max_epochs=40,
    lr=lr_params(peak=0.02),
    doubly_stochastic_weight=0.0,
    patience=40,
)


@dataclass(frozen=True)
class Tiny:
    """A folder with images, features and a trained model."""

    folder: Path

    @property
    def images(self) -> Path:
        """Folder of the images 00.png, 01.png, ..., named by image id."""
        return self.folder / "images"

    @property
    def weights(self) -> Path:
        """Weights file of the encoder."""
        return self.folder / "resnet18.safetensors"

    @property
    def features(self) -> Path:
        return self.folder / "features"

    @property
    def model(self) -> Path:
        return self.folder / "model"


def make_tiny(folder: Path, num_images: int = 40) -> Tiny:
    """Make and encode images and train a captioner on them. Every fifth image is for validation."""
    tiny = Tiny(folder)
    _save_random_weights(tiny.weights)
    records = [_make_image(tiny.images, image_id, "train" if image_id % 5 else "val") for image_id in range(num_images)]
    params = encode_params(tiny.weights, layer="layer2")
    with encode(records, tiny.images, params, folder / "work", torch.device("cpu"), num_threads=2) as result:
        publish(result.store, tiny.features)
    write_token_files(folder, records)
    finished = train_tiny(folder, folder / "run", TRAINING, live_steps=100)
    record_provenance(finished, "images", str(tiny.weights))
    publish(finished, tiny.model)
    return tiny


def copy_model_without_encoder(tiny: Tiny, folder: Path) -> Path:
    """Copy the model to a folder from which the weights of its encoder cannot be found, and return the folder."""
    shutil.copytree(tiny.model, folder)
    record_provenance(folder, "images", "weights/encoder.safetensors")
    return folder


def _save_random_weights(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(torchvision.models.resnet18(weights=None).state_dict(), path)


def _make_image(image_dir: Path, image_id: int, split: Split) -> Record:
    rng = np.random.default_rng(image_id)
    color = sorted(COLORS)[image_id % len(COLORS)]
    pixels = np.array(COLORS[color]) + rng.integers(-8, 8, (20, 28, 3))
    image_dir.mkdir(exist_ok=True)
    name = f"{image_id:02}.png"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(image_dir / name)
    # Captions have equal length, so that length normalization does not change their ranking.
    captions = (f"a {color} thing", f"one {color} thing")
    return Record(image_id=image_id, file=name, split=split, captions=captions)
