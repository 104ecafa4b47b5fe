"""A captioner small enough to train in a test, on images of one color each, by the code that the stages run."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from pipeline.artifacts import publish
from pipeline.captions.records import Record, Split
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.captions.tokens import TOKENS_FILE, tokenize, write_tokens
from pipeline.captions.vocabulary import VOCABULARY_FILE, write_vocabulary
from pipeline.decoder.model_io import record_provenance
from pipeline.decoder.soft_attention import DecoderParams
from pipeline.features.encoder import EncodeParams
from pipeline.features.encoding import encode
from pipeline.training.loop import Intervals
from pipeline.training.lr_schedule import LRParams
from pipeline.training.train import TrainPaths, train_in
from pipeline.training.trainer import TrainParams

COLORS = {"red": (220, 30, 30), "blue": (40, 50, 230), "white": (245, 245, 245)}

ENCODING = {
    "architecture": "resnet18",
    "layer": "layer2",
    "image_size": 32,
    "precision": "float32",
    "compile": False,
    "views": ("whole",),
}
TRAINING = TrainParams(
    seed=1,
    decoder=DecoderParams(
        embedding_size=8, hidden_size=16, attention_size=8, dropout=0.0, region_dropout=0.0, word_dropout=0.0
    ),
    batch_size=8,
    gradient_accumulation_steps=1,
    random_views=False,
    max_epochs=40,
    optimizer="adam",
    weight_decay=0.0,
    lr=LRParams(peak=0.02, warmup_steps=2, schedule="cosine", step_epochs=1, step_factor=1.0),
    max_grad_norm=5.0,
    label_smoothing=0.0,
    scheduled_sampling=0.0,
    doubly_stochastic_weight=0.0,
    ema_decay=0.0,
    precision="float32",
    compile=False,
    select_by="cider",
    patience=40,
    max_length=6,
)


@dataclass(frozen=True)
class Tiny:
    """A folder with images, features and a trained model."""

    folder: Path

    @property
    def images(self) -> Path:
        """Images 00.png, 01.png, ...; the number is the image id."""
        return self.folder / "images"

    @property
    def weights(self) -> Path:
        """Weights of the encoder."""
        return self.folder / "resnet18.safetensors"

    @property
    def features(self) -> Path:
        return self.folder / "features"

    @property
    def model(self) -> Path:
        return self.folder / "model"


def make_tiny(folder: Path, num_images: int = 40) -> Tiny:
    """Make images, encode them, and train a captioner on every image but each fifth, which is for validation."""
    tiny = Tiny(folder)
    _save_random_weights(tiny.weights)
    records = [_make_image(tiny.images, image_id, "train" if image_id % 5 else "val") for image_id in range(num_images)]
    params = EncodeParams(weights=tiny.weights, **ENCODING)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    encode(records, tiny.images, params, folder / "work", tiny.features, cpu, num_threads=2)
    tokenize_params = TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_length=9)
    tokens = folder / "tokens"
    tokens.mkdir()
    dataset = tokenize(records, tokenize_params, folder)
    write_vocabulary(tokens / VOCABULARY_FILE, dataset.vocabulary)
    write_tokens(tokens / TOKENS_FILE, dataset, tokenize_params, "0")
    (folder / "run").mkdir()
    intervals = Intervals(checkpoint_steps=10**9, checkpoint_seconds=1e9, live_steps=100)
    paths = TrainPaths(tokens=tokens, features=tiny.features, work=folder, live=folder / "live")
    finished = train_in(folder / "run", TRAINING, paths, cpu, intervals)
    record_provenance(finished, "images", str(tiny.weights))
    publish(finished, tiny.model)
    return tiny


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
    # Captions have equal length, so length normalization cannot change which one the search prefers.
    captions = (f"a {color} thing", f"one {color} thing")
    return Record(image_id=image_id, file=name, split=split, captions=captions)
