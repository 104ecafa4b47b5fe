"""Throughput and size on disk of every encoder, up to layer4 at 224 px, in float32 with random weights.

Columns of the table:

images/s: images per second of the encoder alone, in batches of the stage.
/ resnet50: the same, divided by the rate of resnet50, which is measured before it in each round.
bytes/image: size of a grid of float16.

Values are medians over the rounds; a ratio is taken within its round.
"""

import os
import time
from statistics import median
from typing import get_args

import torch
from torch import nn

from pipeline.device import setup_device
from pipeline.features.encoder import IMAGES_PER_BATCH, GridEncoder, optimize_for_inference
from pipeline.features.resnets import STRIDES, Architecture, Layer, num_channels

SIZE = 224
LAYER: Layer = "layer4"
BASELINE: Architecture = "resnet50"
NUM_ROUNDS = 3


def make_network(architecture: Architecture, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return optimize_for_inference(GridEncoder(architecture, LAYER).eval(), "float32", False, device)


@torch.inference_mode()
def measure_seconds(network: nn.Module, images: torch.Tensor) -> float:
    start = time.perf_counter()
    float(network(images)[0, 0, 0, 0])  # waits for a GPU
    return time.perf_counter() - start


def main() -> None:
    """Print a row for each encoder."""
    device = setup_device(os.environ.get("GRIDCAP_DEVICE", "auto"))
    images = torch.randn(IMAGES_PER_BATCH, 3, SIZE, SIZE, device=device).to(memory_format=torch.channels_last)
    print(f"encoders on {device}, {torch.get_num_threads()} threads, {SIZE} px, up to {LAYER}, float32")
    print(f"{'':>18} {'images/s':>10} {'/ ' + BASELINE:>12} {'bytes/image':>12}")
    baseline = make_network(BASELINE, device)
    measure_seconds(baseline, images)
    for architecture in get_args(Architecture):
        network = make_network(architecture, device)
        measure_seconds(network, images)
        rounds = [(measure_seconds(baseline, images), measure_seconds(network, images)) for _ in range(NUM_ROUNDS)]
        rate = IMAGES_PER_BATCH / median(seconds for _, seconds in rounds)
        ratio = median(baseline_seconds / seconds for baseline_seconds, seconds in rounds)
        num_bytes = 2 * (SIZE // STRIDES[LAYER]) ** 2 * num_channels(architecture, LAYER)
        print(f"{architecture:>18} {rate:>10.1f} {ratio:>12.2f} {num_bytes:>12,}", flush=True)
