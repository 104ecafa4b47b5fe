"""Tokens and features small enough to train on in a test: each image has one bright region, which shows its color.

The fixture `data` is this dataset, `data_with_text` the same with `TEXT`. The fixture `tiny` (tests/tiny_captioner.py)
starts from image files and also runs the encoder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from pipeline.captions.records import Record, Split
from pipeline.captions.text import TextCaption
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.captions.tokens import TOKENS_FILE, read_tokens, tokenize, write_tokens
from pipeline.captions.vocabulary import VOCABULARY_FILE, read_vocabulary, write_vocabulary
from pipeline.features.store import FeatureStore
from pipeline.training.loop import Intervals
from pipeline.training.text_pretraining import JointTrainer, Text, TextPretrainer
from pipeline.training.train import CHECKPOINT_FILE, TrainPaths, train_in
from pipeline.training.trainer import TextPretrainingParams, Trainer, TrainParams
from pipeline.training.warm_start import initial_weights
from tests.factories import lr_params, small_spec, train_params
from tests.feature_stores import write_store

COLORS = ["red", "green", "blue", "black"]
NUM_TRAIN, NUM_VAL = 24, 8
NUM_REGIONS, CHANNELS = 4, 6
SPEC = small_spec(channels=CHANNELS)
CPU = torch.device("cpu")
TOKENIZE = TokenizeParams(language="en", lowercase=True, punctuation="drop", min_count=1, max_length=9)

TEXT = [
    TextCaption(f"{start} {color} {noun}")
    for start in ("a", "the big")
    for color in COLORS
    for noun in ("car", "thing")
]
"""Captions without images."""

EVERY_FEATURE = train_params(
    gradient_accumulation_steps=2,
    optimizer="adamw",
    weight_decay=0.01,
    ema_decay=0.9,
    label_smoothing=0.1,
    scheduled_sampling=0.3,
    lr=lr_params(schedule="step"),
    text_pretraining=TextPretrainingParams(max_epochs=2, joint_weight=0.5, num_regions=3, ridge_penalty=1.0, noise=0.1),
)
"""Training with every optional feature."""


def make_dataset(folder: Path, text: Sequence[TextCaption] = ()) -> Path:
    """Write the folders `tokens` and `features`, as `tokenize` and `encode` do, and return `folder`."""
    rng = np.random.default_rng(0)
    splits: list[Split] = ["train"] * NUM_TRAIN + ["val"] * NUM_VAL
    records, grids = [], []
    for image_id, split in enumerate(splits):
        color = int(rng.integers(len(COLORS)))
        grid = rng.random((NUM_REGIONS, CHANNELS)).astype(np.float16) / 8
        grid[rng.integers(NUM_REGIONS), color] = 4
        grids.append(grid)
        captions = (f"a {COLORS[color]} thing", f"the thing is {COLORS[color]}", COLORS[color])[: 2 + image_id % 2]
        records.append(Record(image_id=image_id, file=f"{image_id}.jpg", split=split, captions=captions))
    write_token_files(folder, records, text)
    write_store(folder / "features", SPEC, range(len(records)), np.stack(grids))
    return folder


def write_token_files(folder: Path, records: list[Record], text: Sequence[TextCaption] = ()) -> None:
    """Write the folder `tokens`, as `tokenize` does."""
    dataset = tokenize(records, TOKENIZE, folder, text)
    (folder / "tokens").mkdir()
    write_vocabulary(folder / "tokens" / VOCABULARY_FILE, dataset.vocabulary)
    write_tokens(folder / "tokens" / TOKENS_FILE, dataset, TOKENIZE, "0")


def make_trainer(data: Path, folder: Path, params: TrainParams, device: torch.device = CPU) -> Trainer:
    """Make the trainer of a run whose checkpoint is in `folder`."""
    tokens, vocabulary = data / "tokens" / TOKENS_FILE, read_vocabulary(data / "tokens" / VOCABULARY_FILE)
    weights = None
    if params.start_from is not None:
        weights, _ = initial_weights(params.start_from, params, vocabulary, SPEC)
    return Trainer(
        params=params,
        train=read_tokens(tokens, "train"),
        val=read_tokens(tokens, "val"),
        store=FeatureStore(data / "features"),
        vocabulary=vocabulary,
        checkpoint=folder / CHECKPOINT_FILE,
        device=device,
        initial_weights=weights,
    )


T = TypeVar("T", TextPretrainer, JointTrainer)


def make_text_trainer(
    kind: type[T], data: Path, checkpoint: Path, params: TrainParams, device: torch.device = CPU
) -> T:
    """Make a trainer on captions without images, with random weights."""
    tokens, vocabulary = data / "tokens" / TOKENS_FILE, read_vocabulary(data / "tokens" / VOCABULARY_FILE)
    train, store = read_tokens(tokens, "train"), FeatureStore(data / "features")
    return kind(
        params=params,
        text=Text.fit(read_tokens(tokens, "text"), train, store, len(vocabulary), params),
        train=train,
        val=read_tokens(tokens, "val"),
        store=store,
        vocabulary=vocabulary,
        checkpoint=checkpoint,
        device=device,
    )


def take_steps(trainer: Trainer, num_steps: int) -> None:
    """Take some optimizer steps, across epochs, and save a checkpoint."""
    while not trainer.is_finished:
        for _ in trainer.train_epoch(lambda _: False):
            num_steps -= 1
            if num_steps == 0:
                trainer.save_checkpoint()
                return
        trainer.end_epoch()
        trainer.save_checkpoint()


def paths_of(data: Path, folder: Path) -> TrainPaths:
    """Return the paths of a run on the dataset `data` that works in `folder`."""
    return TrainPaths(tokens=data / "tokens", features=data / "features", work=folder, live=folder / "live")


def train_tiny(data: Path, folder: Path, params: TrainParams, live_steps: int = 1, device: torch.device = CPU) -> Path:
    """Train in `folder`, which also gets the live metrics, and return the finished model folder."""
    folder.mkdir(exist_ok=True)
    intervals = Intervals(checkpoint_steps=10**9, checkpoint_seconds=1e9, live_steps=live_steps)
    return train_in(folder, params, paths_of(data, folder), device, intervals)


def read_files(folder: Path) -> dict[str, bytes]:
    """Read the content of each file of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
