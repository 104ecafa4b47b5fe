"""Time of a step of `refine`, compared with a cross-entropy step of captions of the same number and length.

Both trainers take a step on the same batch of 16 images with grids of 7 x 7 x 2048, in turn. `refine` samples 5
captions per image, rewards them and learns from them; cross-entropy learns from 5 captions of the dataset. Words are
drawn from Zipf's law. A random decoder rarely ends a caption, so the sampled captions have the maximum length, which is
that of the others. Ratios are medians over the rounds.
"""

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.processor import describe_device
from benchmarks.reading import SPEC
from benchmarks.training import synchronize
from benchmarks.workloads import decoder_params, make_vocabulary, save_random_model
from pipeline.captions.tokens import CaptionTokens
from pipeline.captions.vocabulary import END, SPECIALS, START
from pipeline.decoder.decoder import DecoderKind
from pipeline.decoder.model_io import TrainedModel, read_model
from pipeline.decoder.registry import DECODERS
from pipeline.device import setup_device
from pipeline.features.store import FeatureStore, write_index, write_shard
from pipeline.training.batches import CaptionBatches
from pipeline.training.lr_schedule import LRParams
from pipeline.training.self_critical import RefineParams, SelfCriticalTrainer
from pipeline.training.trainer import Trainer

NUM_IMAGES, BATCH_SIZE, CAPTIONS_PER_IMAGE, CAPTION_LENGTH, NUM_WORDS, SIZE = 64, 16, 5, 12, 2500, 512
NUM_ROUNDS = 5
MAX_RATIO = 3.0
"""Target for the time of a step divided by that of a cross-entropy step."""


def write_store(folder: Path) -> FeatureStore:
    """Write a store of random grids of the images 0 to `NUM_IMAGES - 1`."""
    grids = np.random.default_rng(0).random((NUM_IMAGES, *SPEC.grid_shape), dtype=np.float32).astype(np.float16)
    digests = {image_id: f"{image_id:064}" for image_id in range(NUM_IMAGES)}
    keys = [(digest, "whole") for digest in digests.values()]
    shard = write_shard(folder, SPEC, range(NUM_IMAGES), keys, grids)
    write_index(folder, SPEC, ["whole"], [shard], digests)
    return FeatureStore(folder)


def draw_captions() -> CaptionTokens:
    """Draw captions of `CAPTION_LENGTH` words for each image."""
    num_captions = NUM_IMAGES * CAPTIONS_PER_IMAGE
    ids = np.random.default_rng(0).zipf(1.3, size=(num_captions, CAPTION_LENGTH)) % NUM_WORDS + len(SPECIALS)
    words = np.array([*SPECIALS, *(f"word{i}" for i in range(NUM_WORDS))])[ids]
    tokens = np.pad(ids.astype(np.int32), ((0, 0), (1, 1)), constant_values=((0, 0), (START, END)))
    tokens[:, 0] = START
    return CaptionTokens(
        ids=tokens.ravel(),
        offset=np.arange(num_captions + 1) * tokens.shape[1],
        image_id=np.repeat(np.arange(NUM_IMAGES), CAPTIONS_PER_IMAGE),
        text="".join(f"{' '.join(caption)}\n" for caption in words),
    )


def refine_params(baseline: Literal["mean", "greedy"]) -> RefineParams:
    """Return params whose samples are as many and as long as the captions of the dataset."""
    return RefineParams(
        max_epochs=1,
        seed=1,
        batch_size=BATCH_SIZE,
        num_samples=CAPTIONS_PER_IMAGE,
        baseline=baseline,
        bleu4_weight=0.0,
        cross_entropy_weight=0.0,
        lr=LRParams(peak=1e-5, warmup_steps=0, schedule="constant", step_epochs=1, step_factor=1.0),
        max_grad_norm=5.0,
        ema_decay=0.99,
        precision="float32",
        select_by="last",
        patience=1,
        max_length=CAPTION_LENGTH + 1,  # as `<end>` is a word of the other captions
    )


def make_steps(
    model: TrainedModel, captions: CaptionTokens, store: FeatureStore, folder: Path, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Return functions that take a step of cross-entropy, and of `refine` with each baseline, on one batch."""
    common: dict[str, Any] = {"train": captions, "val": captions, "store": store, "device": device}
    common["checkpoint"] = folder / "missing"
    batch = next(iter(CaptionBatches(captions, store, BATCH_SIZE).shuffled(1, 0)))
    params = refine_params("mean").train_params(model.config.decoder)
    trainers = {"cross-entropy": Trainer(params=params, vocabulary=model.vocabulary, **common)}
    for baseline in ("mean", "greedy"):
        trainers[baseline] = SelfCriticalTrainer(params=refine_params(baseline), model=model, **common)
    return {name: partial(trainer.train_step, [batch]) for name, trainer in trainers.items()}


def main(kinds: tuple[DecoderKind, ...] = tuple(DECODERS)) -> None:
    """Print milliseconds of a step of each decoder, and the ratios to cross-entropy."""
    device = setup_device(os.environ.get("GRIDCAP_DEVICE", "auto"))
    print(
        f"a step of refine on {describe_device(device)}: {BATCH_SIZE} images x {CAPTIONS_PER_IMAGE} captions x"
        f" {CAPTION_LENGTH + 1} words; medians of {NUM_ROUNDS} rounds"
    )
    print(f"{'':>16} {'cross-entropy, ms':>18} {'baseline mean, ms':>18} {'ratio':>6} {'greedy, ms':>11} {'ratio':>6}")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        store, captions = write_store(Path(folder)), draw_captions()
        for kind in kinds:
            params = decoder_params(embedding_size=SIZE, hidden_size=SIZE, attention_size=SIZE, kind=kind)
            model = read_model(save_random_model(Path(folder) / kind, params, SPEC, make_vocabulary(NUM_WORDS)))
            steps = make_steps(model, captions, store, Path(folder), device)
            rounds = [{name: run_timed(step, device) for name, step in steps.items()} for _ in range(NUM_ROUNDS + 1)]
            rounds = rounds[1:]  # the first warms up
            milliseconds = {name: 1000 * median(times[name] for times in rounds) for name in steps}
            ratios = {name: median(times[name] / times["cross-entropy"] for times in rounds) for name in steps}
            print(
                f"{kind:>16} {milliseconds['cross-entropy']:>18.0f} {milliseconds['mean']:>18.0f}"
                f" {ratios['mean']:>6.2f} {milliseconds['greedy']:>11.0f} {ratios['greedy']:>6.2f}",
                flush=True,
            )
            worst = max(worst, ratios["mean"])
    verdict = "reached" if worst <= MAX_RATIO else "MISSED"
    print(f"{verdict}: a step with baseline mean in at most {MAX_RATIO:.1f} times a cross-entropy step")


def run_timed(step: Callable[[], object], device: torch.device) -> float:
    """Take a step and return its seconds."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start
