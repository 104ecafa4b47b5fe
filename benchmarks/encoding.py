"""Throughput of the stage `encode`, in images per second, compared with its limits and with a plain loop.

Columns of the table, all measured on the same photographs in one process:

encoder: the encoder alone, on batches of decoded images, one after the other. The stage encodes two at a time.
decoding: reading, decoding and resizing alone, with one thread per CPU.
stage: all of `encode`, with an empty work folder each time. The encoder is loaded and warmed up before.
loop: a plain loop. Each image is opened with Pillow, resized and cropped by torchvision's transforms, encoded by
    torchvision's own ResNet in float32, and saved as an .npy file.
peak: rate of the encoder if all its multiplications ran at this machine's rate for products of 2048 x 2048 matrices,
    which is measured too.
stage / sum, stage / max: time of the stage divided by the sum, or by the maximum, of the times of encoder and decoding.
    The stage decodes ahead while the encoder runs. With separate CPUs for each it would take the maximum, with shared
    CPUs the sum.
stage / loop: speed-up of the stage over the plain loop.
peak / loop: the same for peak, an upper bound for any stage at this precision, even if decoding were free.
start, s: seconds to load the encoder, compile it, and encode a first batch.
busy: on a GPU, share of the time of the stage in which it computes.
error: Euclidean distance of the grids from those of float32, divided by the norm of the latter.

Below each table is the error of float32 grids of images with invisible noise, of at most 2 of 255 levels. ResNet-18
has ImageNet weights if shared/real has them. ResNet-50 is random, which amplifies differences.

Each round measures all columns once. Rates and ratios are medians over the rounds; a ratio is taken within its round.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from benchmarks.processor import describe_device, read_clock, supports
from benchmarks.training import busy_share
from benchmarks.workloads import encode_params, real_weights, save_random_weights, write_photographs
from pipeline.captions.records import Record
from pipeline.device import setup_device
from pipeline.errors import UserError
from pipeline.features import encoding
from pipeline.features.encoder import (
    IMAGES_PER_BATCH,
    EncodeParams,
    Precision,
    encode_grids,
    load_encoder,
    optimize_for_inference,
    read_encoder,
)
from pipeline.features.encoding import encode
from pipeline.features.images import Pixels, read_image
from pipeline.features.resnets import IMAGENET, Architecture, Layer
from pipeline.features.store import FeatureStore, Grids

SIZE = 224
ENCODERS: list[tuple[Architecture, Layer]] = [("resnet50", "layer4"), ("resnet18", "layer3")]
NUM_IMAGES, NUM_ROUNDS = 512, 3
NOISE_LEVELS = 2
MATRIX_SIZE, NUM_PRODUCTS = 2048, 16
NUM_THREADS = os.cpu_count() or 1

Task = Callable[[Path], object]
"""Function that processes all images and may write to a new, empty folder."""


class Mode(NamedTuple):
    """Precision of the encoder, and whether it is compiled: a row of the table."""

    name: str
    precision: Precision
    compiled: bool


MODES = [
    Mode("float32", "float32", False),
    Mode("bfloat16", "bfloat16", False),
    Mode("bfloat16 compiled", "bfloat16", True),
    Mode("int8", "int8", False),
]


class Stage:
    """The stage in one mode, with a warmed-up encoder."""

    def __init__(self, params: EncodeParams, device: torch.device, batch: Pixels) -> None:
        """Load the encoder, compile it if `params.compile`, and encode a batch.

        Raises:
            UserError: This machine does not support the mode.
        """
        start = read_clock(device)
        self._params, self._device = params, device
        self._encoder = load_encoder(params)
        self._network = optimize_for_inference(self._encoder, params.precision, params.compile, device)
        encode_grids(self._network, batch)
        self.start_seconds = read_clock(device) - start

    def encode_batches(self, batches: Sequence[Pixels], _: Path) -> npt.NDArray[np.float16]:
        return np.concatenate([encode_grids(self._network, batch) for batch in batches])

    def encode(self, records: Sequence[Record], image_dir: Path, folder: Path) -> FeatureStore:
        with (
            patch.object(encoding, "load_encoder", return_value=self._encoder),
            patch.object(encoding, "optimize_for_inference", return_value=self._network),
            open(os.devnull, "w") as devnull,
            contextlib.redirect_stderr(devnull),
            encode(records, image_dir, self._params, folder, self._device, NUM_THREADS) as result,
        ):
            assert result.counts.encoded == len(records)
            return FeatureStore(result.store)


def decode(files: Sequence[Path], _: Path) -> list[Pixels]:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(lambda file: read_image(file, SIZE), files))


def plain_loop(network: nn.Module, files: Sequence[Path], device: torch.device, folder: Path) -> None:
    transform = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET.mean, IMAGENET.standard_deviation),
        ]
    )
    with torch.no_grad():
        for file in files:
            image = transform(Image.open(file).convert("RGB")).unsqueeze(0).to(device)  # [1, 3, S, S]
            grid = network(image).squeeze(0).permute(1, 2, 0).flatten(0, 1)  # [P, C]
            np.save(folder / f"{file.stem}.npy", grid.cpu().numpy())


def count_flops(network: nn.Module) -> int:
    """Count the floating-point operations per image: two per multiply-add."""
    weight = next(network.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(weight.new_zeros(1, 3, SIZE, SIZE))
    return int(counter.get_total_flops())


def multiply_matrices(matrix: torch.Tensor, _: Path) -> float:
    matmul = torch._int_mm if matrix.dtype == torch.int8 else torch.mm
    for _round in range(NUM_PRODUCTS):
        product = matmul(matrix, matrix)
    return float(product[0, 0])  # waits for a GPU


def measure_seconds(task: Task, device: torch.device) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = read_clock(device)
        task(Path(folder))
        return read_clock(device) - start


def split_batches(images: Pixels) -> list[Pixels]:
    """Split images, uint8 [B, S, S, 3], into batches; the last is padded, as in the stage."""
    padding = np.zeros((-len(images) % IMAGES_PER_BATCH, *images.shape[1:]), dtype=np.uint8)
    padded = np.concatenate([images, padding])
    return np.split(padded, len(padded) // IMAGES_PER_BATCH)


def add_noise(images: Pixels) -> Pixels:
    """Change every value at random by at most `NOISE_LEVELS`."""
    noise = np.random.default_rng(0).integers(-NOISE_LEVELS, NOISE_LEVELS + 1, images.shape)
    return (images + noise).clip(0, 255).astype(np.uint8)


def relative_error(grids: Grids, expected: Grids) -> float:
    """Compute the Euclidean distance from the expected grids, divided by their norm."""
    reference = expected.astype(np.float32)
    return float(np.linalg.norm(grids.astype(np.float32) - reference) / np.linalg.norm(reference))


def main(
    num_images: int = NUM_IMAGES,
    num_rounds: int = NUM_ROUNDS,
    encoders: Sequence[tuple[Architecture, Layer]] = tuple(ENCODERS),
    modes: Sequence[Mode] = tuple(MODES),
) -> None:
    """Print a table for each encoder."""
    logging.getLogger("gridcap").setLevel(logging.WARNING)
    device = setup_device(os.environ.get("GRIDCAP_DEVICE", "auto"))
    with tempfile.TemporaryDirectory() as folder:
        image_dir = Path(folder) / "images"
        image_dir.mkdir()
        records, description = write_photographs(image_dir, num_images)
        print(f"encoding on {describe_device(device)}, {SIZE} px, {num_images} images: {description}")
        print(f"images per second; medians of {num_rounds} rounds")
        columns = ["encoder", "decoding", "stage", "loop", "peak"]
        ratios = ["stage / sum", "stage / max", "stage / loop", "peak / loop", "start, s", "busy", "error"]
        print(f"{'':>28} " + " ".join(f"{name:>8}" for name in columns) + " " + " ".join(f"{n:>12}" for n in ratios))
        for architecture, layer in encoders:
            for line in benchmark_encoder(architecture, layer, records, image_dir, device, num_rounds, modes):
                print(line, flush=True)


def benchmark_encoder(
    architecture: Architecture,
    layer: Layer,
    records: Sequence[Record],
    image_dir: Path,
    device: torch.device,
    num_rounds: int,
    modes: Sequence[Mode],
) -> list[str]:
    """Measure an encoder in some modes, of which the first is float32.

    Args:
        architecture: Architecture of the ResNet.
        layer: Last layer kept.
        records: Records of the images.
        image_dir: Folder of the image files.
        device: Where to encode.
        num_rounds: Rounds of measurement.
        modes: The modes; int8 is skipped on a GPU.

    Returns:
        Lines of the table.
    """
    files = [image_dir / record.file for record in records]
    batches = split_batches(np.stack(decode(files, image_dir)))
    weights = real_weights(architecture, layer)
    if weights is None:
        weights = image_dir.parent / f"{architecture}.safetensors"
        save_random_weights(architecture, weights)
    resnet = read_encoder(weights, architecture, layer).to(device)
    resnet.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    plain_loop(resnet, files[:1], device, image_dir.parent)
    tasks: dict[str, Task] = {
        "decoding": partial(decode, files),
        "loop": partial(plain_loop, resnet, files, device),
    }
    modes = [mode for mode in modes if mode.precision != "int8" or device.type == "cpu"]
    for mode in modes:
        matrix = torch.ones(MATRIX_SIZE, MATRIX_SIZE, device=device, dtype=getattr(torch, mode.precision))
        multiply_matrices(matrix, image_dir)
        tasks[f"{mode.precision} products"] = partial(multiply_matrices, matrix)
    stages: dict[Mode, Stage] = {}
    skipped = []
    for mode in modes:
        if not supports(mode.precision, device):
            instructions = f"this processor has no {mode.precision} instructions"
            skipped.append(f"{f'{architecture} {mode.name}':>28} skipped: {instructions}")
            continue
        params = encode_params(architecture, layer, weights, SIZE, mode.precision, mode.compiled)
        try:
            stage = stages[mode] = Stage(params, device, batches[0])
        except UserError as error:
            skipped.append(f"{f'{architecture} {mode.name}':>28} skipped: {error}")
            continue
        check_same_work(stage, records, image_dir, batches)
        tasks[f"{mode.name} encoder"] = partial(stage.encode_batches, batches)
        tasks[f"{mode.name} stage"] = partial(stage.encode, records, image_dir)
    grids = {mode: stage.encode_batches(batches, image_dir) for mode, stage in stages.items()}
    float32 = modes[0]
    noisy = stages[float32].encode_batches([add_noise(batch) for batch in batches], image_dir)
    rounds = [{name: measure_seconds(task, device) for name, task in tasks.items()} for _ in range(num_rounds)]
    fastest = min(stages, key=lambda mode: median(times[f"{mode.name} stage"] for times in rounds))
    busy = dict.fromkeys(stages, "")
    if device.type == "cuda":
        for mode in stages:
            encode_all = partial(measure_seconds, tasks[f"{mode.name} stage"])
            busy[mode] = f"{busy_share(encode_all, device, repetitions=1):.0%}"
    # FLOPs of one image in the encoder, relative to those of one call of `multiply_matrices`.
    relative_flops = count_flops(resnet) / (2 * MATRIX_SIZE**3 * NUM_PRODUCTS)
    return [
        *(
            f"{f'{architecture} {mode.name}':>28} {format_row(mode, rounds, len(files), relative_flops)}"
            f" {stage.start_seconds:>12.1f} {busy[mode]:>12} {relative_error(grids[mode], grids[float32]):>12.3f}"
            for mode, stage in stages.items()
        ),
        f"{architecture} with {weights.name}: error of noise {relative_error(noisy, grids[float32]):.3f}",
        f"{architecture}: best mode {fastest.name}",
        *skipped,
    ]


def format_row(mode: Mode, rounds: Sequence[Mapping[str, float]], num_images: int, relative_flops: float) -> str:
    """Format the rates and ratios of a mode.

    Args:
        mode: The mode.
        rounds: Seconds of each task, by round.
        num_images: Images that each task processes.
        relative_flops: FLOPs of one image, relative to those of one call of `multiply_matrices`.
    """
    encoder, stage = f"{mode.name} encoder", f"{mode.name} stage"
    rates = [num_images / median(times[task] for times in rounds) for task in (encoder, "decoding", stage, "loop")]
    seconds_at_peak = [relative_flops * times[f"{mode.precision} products"] for times in rounds]  # per image
    rates.append(1 / median(seconds_at_peak))
    ratios = [
        median(times[stage] / (times[encoder] + times["decoding"]) for times in rounds),
        median(times[stage] / max(times[encoder], times["decoding"]) for times in rounds),
        median(times["loop"] / times[stage] for times in rounds),
        median(times["loop"] / (num_images * seconds) for times, seconds in zip(rounds, seconds_at_peak, strict=True)),
    ]
    return " ".join([*(f"{rate:>8.1f}" for rate in rates), *(f"{ratio:>12.2f}" for ratio in ratios)])


def check_same_work(stage: Stage, records: Sequence[Record], image_dir: Path, batches: Sequence[Pixels]) -> None:
    """Check that the stage and the encoder alone compute the same grids, which also warms up both."""
    first = records[:IMAGES_PER_BATCH]
    with tempfile.TemporaryDirectory() as folder:
        stored = stage.encode(first, image_dir, Path(folder)).grids(record.image_id for record in first)
    assert np.array_equal(stored, stage.encode_batches(batches[:1], image_dir)[: len(first)])
