"""Images a second of the stage `encode` beside its limits and a plain loop, on the same photographs in one run.

limit: the ResNet alone, on batches of pictures in memory, through `encode_grids`, one after the other. The stage takes
two at a time.
decoding: reading, decoding and resizing alone, by as many threads as there are processors.
stage: all of `encode`, in a work folder that is new each time, with the published store. It is lent a network that has
run before: to read the weights, to compile the ResNet and to encode a first batch is once a run's affair, whatever the
number of images, and is told apart, as start.
plain loop: what scripts do. A picture at a time is opened with Pillow, resized and cropped by torchvision's transforms,
taken through torchvision's own ResNet in float32, and saved in an .npy file of its own.

at rate: what the ResNet would reach if all its multiplications ran at this machine's rate of products of 2048 x 2048
matrices, which is measured beside the rest. "at most" is that over the plain loop: what no stage could surpass that
multiplies as the ResNet does, in this precision, even if decoding were free.

off: how far grids are from those of float32, as a share of their size (Euclidean norms over all of them). Beside it
stands how far float32's own grids move when each pixel's colors change at random by up to 2 of 255, which no eye sees.
ResNet-18 has ImageNet's weights where shared/real has them; a random ResNet-50 multiplies differences.

Rounds take all of them in turn. Rates are medians of the rounds, and so are ratios, each taken within its round. The
stage reads ahead while the ResNet computes: with a processor for each it would take the time of the slower; where both
share all processors, that of both.
"""

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from benchmarks.workloads import photographs, real_weights, save_weights
from pipeline.captions.records import Record
from pipeline.device import setup_device
from pipeline.errors import UserError
from pipeline.features import encoding
from pipeline.features.encoder import (
    IMAGES_PER_BATCH,
    Architecture,
    EncodeParams,
    Layer,
    Precision,
    encode_grids,
    for_inference,
    load_encoder,
    read_encoder,
)
from pipeline.features.encoding import encode
from pipeline.features.images import MEAN, STANDARD_DEVIATION, Pixels, read_image
from pipeline.features.store import FeatureStore, Grids

SIZE = 224
CASES: list[tuple[Architecture, Layer]] = [("resnet50", "layer4"), ("resnet18", "layer3")]
MODES: list[tuple[str, Precision, bool]] = [
    ("float32", "float32", False),
    ("bfloat16", "bfloat16", False),
    ("bfloat16 compiled", "bfloat16", True),
    ("int8", "int8", False),
]
PICTURES, ROUNDS = 512, 3
NOISE = 2
SQUARE, PRODUCTS = 2048, 16
THREADS = os.cpu_count() or 1

Measure = Callable[[Path], object]
"""Work on all pictures; it may write into the folder given, which is new and empty."""


class Stage:
    """The stage in one mode, and the network that it is lent."""

    def __init__(self, params: EncodeParams, device: torch.device, first: Pixels) -> None:
        """Load, compile where asked to, and encode a first batch. Raises `UserError` where that cannot be done."""
        began = time.perf_counter()
        self._params, self._device = params, device
        self._encoder = load_encoder(params)
        self._network = for_inference(self._encoder, params.precision, params.compile, device)
        encode_grids(self._network, first)
        self.start = time.perf_counter() - began
        """Seconds that took."""

    def limit(self, batches: Sequence[Pixels], _: Path) -> npt.NDArray[np.float16]:
        return np.concatenate([encode_grids(self._network, batch) for batch in batches])

    def encode(self, records: Sequence[Record], images: Path, folder: Path) -> FeatureStore:
        with (
            patch.object(encoding, "load_encoder", return_value=self._encoder),
            patch.object(encoding, "for_inference", return_value=self._network),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            done = encode(records, images, self._params, folder / "work", folder / "out", self._device, THREADS)
        assert done.counts.encoded == len(records)
        return FeatureStore(folder / "out")


def decode(files: Sequence[Path], _: Path) -> list[Pixels]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda file: read_image(file, SIZE), files))


def plain(network: nn.Module, files: Sequence[Path], device: torch.device, folder: Path) -> None:
    transform = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STANDARD_DEVIATION),
        ]
    )
    with torch.no_grad():
        for file in files:
            picture = transform(Image.open(file).convert("RGB")).unsqueeze(0).to(device)
            grid = network(picture).squeeze(0).permute(1, 2, 0).flatten(0, 1)  # [P, C]
            np.save(folder / f"{file.stem}.npy", grid.cpu().numpy())


def operations(network: nn.Module) -> int:
    """Operations that a picture takes: two for each multiplication."""
    weight = next(network.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(weight.new_zeros(1, 3, SIZE, SIZE))
    return int(counter.get_total_flops())


def multiply(square: torch.Tensor, _: Path) -> float:
    product_of = torch._int_mm if square.dtype == torch.int8 else torch.mm
    for _round in range(PRODUCTS):
        product = product_of(square, square)
    return float(product[0, 0])  # on a GPU it waits for all of them


def seconds(measure: Measure) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        measure(Path(folder))
        return time.perf_counter() - began


def batched(pixels: Pixels) -> list[Pixels]:
    """Full batches; the last is filled up, as in the stage."""
    filler = np.zeros((-len(pixels) % IMAGES_PER_BATCH, *pixels.shape[1:]), dtype=np.uint8)
    return np.split(np.concatenate([pixels, filler]), (len(pixels) + len(filler)) // IMAGES_PER_BATCH)


def main(pictures: int = PICTURES, rounds: int = ROUNDS) -> None:
    """Print images a second, the stage's time in those of its parts, and its gain over the plain loop."""
    device = setup_device(os.environ.get("GRIDCAP_DEVICE", "auto"))
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        records, told = photographs(images, pictures)
        print(f"encoding on {device}, {torch.get_num_threads()} threads, {SIZE} px, {pictures} images: {told}")
        print(f"median of {rounds} rounds; / both: stage's time in that of limit and decoding; / slower: of the slower")
        print(
            f"{'':>28} {'limit':>8} {'decoding':>8} {'stage':>8} {'plain':>8} {'at rate':>8}   images a"
            f" second   {'/ both':>8} {'/ slower':>8} {'x plain':>8} {'at most':>8} {'start, s':>9} {'off':>7}"
        )
        for case in CASES:
            for line in compared(case, records, images, device, rounds):
                print(line, flush=True)


def compared(
    case: tuple[Architecture, Layer], records: Sequence[Record], images: Path, device: torch.device, rounds: int
) -> list[str]:
    """The lines of one ResNet."""
    architecture, layer = case
    files = [images / record.file for record in records]
    batches = batched(np.stack(decode(files, images)))
    weights = real_weights(architecture, layer)
    if weights is None:
        weights = images.parent / f"{architecture}.safetensors"
        save_weights(architecture, weights)
    unchanged = read_encoder(weights, architecture, layer).to(device)
    unchanged.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    measures: dict[str, Measure] = {
        "decoding": partial(decode, files),
        "plain": partial(plain, unchanged, files, device),
    }
    modes = [mode for mode in MODES if mode[1] != "int8" or device.type == "cpu"]
    for _, precision, _ in modes:
        square = torch.ones(SQUARE, SQUARE, device=device, dtype=getattr(torch, precision))
        multiply(square, images)
        measures[precision] = partial(multiply, square)
    cost = operations(unchanged) / (2 * SQUARE**3 * PRODUCTS)  # of a picture, in runs of `multiply`
    starts: dict[str, float] = {}
    off: dict[str, float] = {}
    exact = noisy = None
    skipped = []
    for mode, precision, compiled in modes:
        params = EncodeParams(
            architecture=architecture,
            layer=layer,
            weights=str(weights),
            image_size=SIZE,
            precision=precision,
            compile=compiled,
            views=("whole",),
        )
        try:
            lent = Stage(params, device, batches[0])
        except UserError as error:
            skipped.append(f"{f'{architecture} {mode}':>28} skipped: {error}")
            continue
        check(lent, records, images, batches)
        starts[mode] = lent.start
        found = lent.limit(batches, images)
        if exact is None:
            exact, noisy = found, lent.limit([disturbed(batch) for batch in batches], images)
        off[mode] = distance(found, exact)
        measures[f"{mode} limit"] = partial(lent.limit, batches)
        measures[f"{mode} stage"] = partial(lent.encode, records, images)
    plain(unchanged, files[:1], device, images.parent)
    taken: list[dict[str, float]] = [
        {name: seconds(measure) for name, measure in measures.items()} for _ in range(rounds)
    ]
    lines = []
    for mode, precision, _ in modes:
        if mode not in starts:
            continue
        limit, stage = f"{mode} limit", f"{mode} stage"
        rates = " ".join(
            f"{len(files) / median(times[name] for times in taken):>8.1f}"
            for name in (limit, "decoding", stage, "plain")
        )
        at_rate = 1 / (cost * median(times[precision] for times in taken))
        both = median(times[stage] / (times[limit] + times["decoding"]) for times in taken)
        slower = median(times[stage] / max(times[limit], times["decoding"]) for times in taken)
        gain = median(times["plain"] / times[stage] for times in taken)
        most = median(times["plain"] / (cost * len(files) * times[precision]) for times in taken)
        lines.append(
            f"{f'{architecture} {mode}':>28} {rates} {at_rate:>8.1f} {'':>17}   {both:>8.2f} {slower:>8.2f}"
            f" {gain:>8.2f} {most:>8.2f} {starts[mode]:>9.1f} {off[mode]:>7.3f}"
        )
    if exact is not None and noisy is not None:
        lines.append(
            f"{architecture} has {weights.name}; noise in the pictures moves float32's grids by"
            f" {distance(noisy, exact):.3f}"
        )
    return lines + skipped


def disturbed(pictures: Pixels) -> Pixels:
    """The pictures with every value changed at random by up to `NOISE`."""
    noise = np.random.default_rng(0).integers(-NOISE, NOISE + 1, pictures.shape)
    return (pictures + noise).clip(0, 255).astype(np.uint8)


def distance(grids: Grids, exact: Grids) -> float:
    """Euclidean distance from `exact`, as a share of its norm."""
    reference = exact.astype(np.float32)
    return float(np.linalg.norm(grids.astype(np.float32) - reference) / np.linalg.norm(reference))


def check(stage: Stage, records: Sequence[Record], images: Path, batches: Sequence[Pixels]) -> None:
    """Make sure that stage and limit do the same work, and that both have run before they are timed."""
    few = records[:IMAGES_PER_BATCH]
    with tempfile.TemporaryDirectory() as folder:
        stored = stage.encode(few, images, Path(folder)).grids(record.image_id for record in few)
    assert np.array_equal(stored, stage.limit(batches[:1], images)[: len(few)])
