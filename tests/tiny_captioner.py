"""A captioner small enough to train in a test, on pictures of one color each: through the same code as the stages."""

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
from pipeline.captions.tokens import TOKENS_FILE, VOCABULARY_FILE, tokenize, write_tokens
from pipeline.captions.vocabulary import write_vocabulary
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
    """A folder in which everything has run."""

    folder: Path

    @property
    def images(self) -> Path:
        """Pictures 00.png, 01.png and so on; a picture's number is its id."""
        return self.folder / "images"

    @property
    def weights(self) -> Path:
        return self.folder / "resnet18.safetensors"

    @property
    def features(self) -> Path:
        return self.folder / "features"

    @property
    def model(self) -> Path:
        return self.folder / "model"


def make_tiny(folder: Path, pictures: int = 40) -> Tiny:
    tiny = Tiny(folder)
    _save_weights(tiny.weights)
    records = [_paint(tiny.images, number, "train" if number % 5 else "val") for number in range(pictures)]
    params = EncodeParams(weights=str(tiny.weights), **ENCODING)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    encode(records, tiny.images, params, folder / "work", tiny.features, cpu, threads=2)
    words = TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_length=9)
    tokens = folder / "tokens"
    tokens.mkdir()
    dataset = tokenize(records, words, folder)
    write_vocabulary(tokens / VOCABULARY_FILE, dataset.vocabulary)
    write_tokens(tokens / TOKENS_FILE, dataset, words, "0")
    (folder / "run").mkdir()
    intervals = Intervals(checkpoint_steps=10**9, checkpoint_seconds=1e9, live_steps=100)
    inputs = TrainPaths(tokens=tokens, features=tiny.features, work=folder, live=folder / "live")
    finished = train_in(folder / "run", TRAINING, inputs, cpu, intervals)
    record_provenance(finished, "images", str(tiny.weights))
    publish(finished, tiny.model)
    return tiny


def _save_weights(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(torchvision.models.resnet18(weights=None).state_dict(), path)


def _paint(images: Path, number: int, split: Split) -> Record:
    rng = np.random.default_rng(number)
    name = sorted(COLORS)[number % len(COLORS)]
    pixels = np.array(COLORS[name]) + rng.integers(-8, 8, (20, 28, 3))
    images.mkdir(exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(images / f"{number:02}.png")
    # Of one length: a search that prefers short captions, or long ones, has no other path to try than greedy search.
    captions = (f"a {name} thing", f"one {name} thing")
    return Record(image_id=number, file=f"{number:02}.png", split=split, captions=captions)
