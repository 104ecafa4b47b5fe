"""Training speed on one CPU thread, compared with all threads of PyTorch.

Steps of soft attention as in `training`, in float32, without compilation, with 5 captions per image. Each round
measures one thread and all threads in turn. Rates and the speedup of one thread are medians of the rounds. The clock is
wall time, so other processes count.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.processor import describe_device
from benchmarks.training import CAPTION_LENGTH, CAPTIONS_PER_IMAGE, LEARNING_RATE, train_step
from benchmarks.workloads import decoder_params
from pipeline.decoder.registry import build_decoder
from pipeline.training.threads import training_threads

SIZES = ((8, 128, 8, 100), (32, 128, 8, 100), (8, 512, 8, 100), (32, 512, 8, 100), (16, 512, 14, 3000))
"""Images, hidden size, height and width of the grid, and vocabulary size."""
CHANNELS, ROUNDS, SECONDS = 256, 3, 3.0


def rate(step: Callable[[], None], num_images: int, num_threads: int) -> float:
    """Measure captions per second."""
    torch.set_num_threads(num_threads)
    step()
    start, num_steps = time.perf_counter(), 0
    while time.perf_counter() < start + SECONDS:
        step()
        num_steps += 1
    return num_steps * num_images * CAPTIONS_PER_IMAGE / (time.perf_counter() - start)


def main() -> None:
    """Measure every size and print a table."""
    all_threads = torch.get_num_threads()
    print(f"threads, {describe_device(torch.device('cpu'))}, captions per second\n")
    print(f"| images | hidden size | grid | 1 thread | {all_threads} threads | speedup of 1 | trained on |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for num_images, size, side, vocab_size in SIZES:
        torch.manual_seed(0)
        decoder = build_decoder(decoder_params(size, size, size, dropout=0.5), (side, side), CHANNELS, vocab_size)
        grids = torch.rand(num_images, side**2, CHANNELS).half()
        tokens = torch.randint(4, vocab_size, (num_images, CAPTIONS_PER_IMAGE, CAPTION_LENGTH + 1))
        optimizer = torch.optim.Adam(decoder.parameters(), lr=LEARNING_RATE, fused=True)
        step = train_step(decoder, optimizer, grids, tokens, "float32")
        rounds = [(rate(step, num_images, 1), rate(step, num_images, all_threads)) for _ in range(ROUNDS)]
        one, many = (median(rates) for rates in zip(*rounds, strict=True))
        speedup = median(a / b for a, b in rounds)
        with training_threads(num_images, size):
            used = torch.get_num_threads()
        grid = f"{side} x {side} x {CHANNELS}"
        print(f"| {num_images} | {size} | {grid} | {one:.0f} | {many:.0f} | {speedup:.2f} | {used} |", flush=True)
