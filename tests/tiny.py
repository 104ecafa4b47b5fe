"""A captioner small enough to train in a test, on pictures of one colour each: through the same code as the stages."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from pipeline.captions.records import Record, Split
from pipeline.captions.tokens import TOKENS_FILE, VOCABULARY_FILE, TokenizeParams, tokenize, write_tokens
from pipeline.captions.vocabulary import write_vocabulary
from pipeline.decoder.attention import DecoderParams
from pipeline.decoder.card import write_card
from pipeline.decoder.saved import note_origin
from pipeline.decoder.schedule import ScheduleParams
from pipeline.decoder.trainer import Rhythm, TrainParams, train
from pipeline.features.encoder import EncodeParams
from pipeline.features.encoding import encode
from pipeline.publish import publish

COLOURS = {"red": (220, 30, 30), "blue": (40, 50, 230), "white": (245, 245, 245)}

ENCODING = {
    "architecture": "resnet18",
    "layer": "layer2",
    "watch": "data",
    "image_size": 32,
    "precision": "float32",
    "compile": False,
    "views": ("whole",),
}
TRAINING = TrainParams(
    seed=1,
    decoder=DecoderParams(embedding=8, state=16, attention=8, dropout=0.0, region_dropout=0.0, word_dropout=0.0),
    images_a_batch=8,
    batches_a_step=1,
    random_views=False,
    epochs=40,
    optimiser="adam",
    weight_decay=0.0,
    learning_rate=ScheduleParams(highest=0.02, warm_up=2, decay="cosine", step_epochs=1, step_factor=1.0),
    clip_norm=5.0,
    label_smoothing=0.0,
    scheduled_sampling=0.0,
    coverage_weight=0.0,
    average=0.0,
    precision="float32",
    compile=False,
    select_by="cider",
    patience=40,
    max_words=6,
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
    words = TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_words=9)
    tokens = folder / "tokens"
    tokens.mkdir()
    dataset = tokenize(records, words, folder)
    write_vocabulary(tokens / VOCABULARY_FILE, dataset.vocabulary)
    write_tokens(tokens / TOKENS_FILE, dataset, words, "0")
    (folder / "run").mkdir()
    rhythm = Rhythm(checkpoint_steps=10**9, checkpoint_seconds=1e9, live_steps=100)
    finished = train(TRAINING, tokens, tiny.features, folder / "run", folder / "live", cpu, rhythm)
    write_card(finished, note_origin(finished, "images", str(tiny.weights)))
    publish(finished, tiny.model)
    return tiny


def _save_weights(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(torchvision.models.resnet18(weights=None).state_dict(), path)


def _paint(images: Path, number: int, split: Split) -> Record:
    rng = np.random.default_rng(number)
    name = sorted(COLOURS)[number % len(COLOURS)]
    pixels = np.array(COLOURS[name]) + rng.integers(-8, 8, (20, 28, 3))
    images.mkdir(exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(images / f"{number:02}.png")
    # Of one length: a search that prefers short captions, or long ones, has no other path to try than greedy search.
    captions = (f"a {name} thing", f"one {name} thing")
    return Record(image_id=number, file=f"{number:02}.png", split=split, captions=captions)
