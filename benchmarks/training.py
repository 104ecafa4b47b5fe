"""Captions a second in training: the decoder beside the textbook's (`pipeline/decoder/soft_attention_reference.py`), on one batch in one run.

A step is the trainer's: forward, loss, backward, gradients clipped, optimizer. The textbook has float32 and a plain
Adam, ours the trainer's fused one and each of its modes; dropout is the same. Rounds take all in turn. Rates are
medians of the rounds, and so are ratios and shares, each taken within its round; from and to are the lowest and the
highest ratio of a round.

What a step of ours multiplies is counted from the shapes of its products (`products`), and the count compared with
PyTorch's own, which also counts the textbook's. Two more rows a precision show what is possible. "its products alone"
runs all products of our step, in its shapes, and nothing else. "at the full rate" is the time they would take at the
rate of a product of 2048 x 2048 matrices; "of rate" is every row's share of that rate in its precision. The last column
is how long the first step took: compilation, where there is any.

Where the time goes is told of the modes that have to reach a ratio, from PyTorch's profiler: time inside operations,
by kind. Products: of matrices. Comparing: states with regions. Elementwise: all other, copies and softmax among them.
Casting: between precisions. The rest: Python's and autograd's own, and on a GPU waiting for them.
"""

import copy
import os
import shutil
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from pipeline.decoder.soft_attention import POSITION_CHANNELS, DecoderParams, SoftAttentionDecoder
from pipeline.decoder.soft_attention_reference import SoftAttentionReference
from pipeline.device import setup_device
from pipeline.training.loss import caption_loss

IMAGES, CAPTIONS, WORDS, SIZE = 16, 5, 13, 512
SIZES = DecoderParams(
    embedding_size=SIZE, hidden_size=SIZE, attention_size=SIZE, dropout=0.5, region_dropout=0.0, word_dropout=0.0
)
ROWS = IMAGES * CAPTIONS
RATE = 4e-4
ROUNDS, STEPS_A_ROUND = 5, 4
SQUARE = 2048
TEXTBOOK, SINGLE_PROCESS, FULL = "textbook, float32", "its products alone", "at the full rate"
PRECISIONS = ["float32", "bfloat16"]

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
KINDS = ("products", "comparing", "elementwise", "casting", "optimizer", "the rest")


class Case(NamedTuple):
    """Grids and a vocabulary, and the ratios that are asked for."""

    side: int
    channels: int
    words: int
    float32: float
    best: float


CASES = [Case(7, 2048, 2500, float32=4, best=10), Case(14, 256, 1100, float32=3, best=6)]


class Mode(NamedTuple):
    """A way to train our decoder."""

    name: str
    precision: str
    compiled: bool


MODES = [
    Mode("ours, float32", "float32", False),
    Mode("ours, float32 compiled", "float32", True),
    Mode("ours, bfloat16", "bfloat16", False),
    Mode("ours, bfloat16 compiled", "bfloat16", True),
]


class Row(NamedTuple):
    """What is timed, and a row of the table."""

    name: str
    precision: str
    work: Callable[[], None]
    multiply_adds: int
    """Of a step."""
    times: int = STEPS_A_ROUND
    """Runs a round."""
    share: float = 1.0
    """How much of a step's multiply-adds a run does."""


class Product(NamedTuple):
    """`times` products of matrices [rows, inner] and [inner, columns], each `batch` times over."""

    times: int
    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def multiply_adds(self) -> int:
        return self.times * self.batch * self.rows * self.inner * self.columns


def products(case: Case) -> Iterator[Product]:
    """All products of matrices in a step of our decoder.

    A layer has one forward, one for its weights' gradient and one for its inputs' gradient, which those that read the
    grids go without. What reads the state or the context does so once a word; the gradients of its weights are one
    product for all words. Where an image has fewer regions than words, its regions are read in place of the context.
    Comparing states with regions is not among them: it adds, rectifies and weighs `words x regions x attention` numbers
    a caption.
    """
    regions, channels = case.side**2, case.channels + POSITION_CHANNELS
    gates, from_either = 4 * SIZE, SIZE + 2 + 4 * SIZE  # query, gate, seek and the LSTM's gates
    words = CAPTIONS * WORDS
    layers = [
        (1, ROWS * WORDS, SIZE, from_either),  # from_word
        (WORDS, ROWS, SIZE, from_either),  # from_state
        (1, ROWS * WORDS, SIZE, SIZE),  # state_output
        (1, ROWS * WORDS, SIZE, case.words),  # vocabulary
    ]
    of_grids = [(IMAGES * regions, SIZE), (IMAGES, SIZE), (IMAGES, SIZE)]  # keys, first hidden state and cell
    if regions < words:
        of_grids += [(IMAGES * regions, gates), (IMAGES * regions, SIZE)]
        for turns, outputs in ((WORDS, gates), (1, SIZE)):
            yield Product(turns, IMAGES, words // turns, regions, outputs)
            yield Product(turns, IMAGES, words // turns, outputs, regions)
            yield Product(1, IMAGES, outputs, words, regions)
    else:
        layers += [(WORDS, ROWS, channels, gates), (1, ROWS * WORDS, channels, SIZE)]  # of the context
        # The mean of regions under attention; the regions themselves have no gradient.
        yield Product(WORDS, IMAGES, CAPTIONS, regions, channels)
        yield Product(WORDS, IMAGES, CAPTIONS, channels, regions)
    for examples, outputs in of_grids:
        yield Product(1, 1, examples, channels, outputs)
        yield Product(1, 1, outputs, examples, channels)
    for turns, examples, inputs, outputs in layers:
        yield Product(turns, 1, examples, inputs, outputs)
        yield Product(turns, 1, examples, outputs, inputs)
        yield Product(1, 1, outputs, turns * examples, inputs)


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, grids: Tensor, tokens: Tensor, precision: str
) -> Callable[[], None]:
    """A function that trains on the batch once."""

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(grids.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits, attention = model(grids, tokens[:, :, :-1])
        loss = caption_loss(logits, attention, tokens[:, :, 1:])
        loss.total(loss.counts, 0.1).backward()  # type: ignore[no-untyped-call]
        with record_function("optimizer"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

    return step


def multiplications(listed: list[Product], precision: str, device: torch.device) -> Callable[[], None]:
    """A function that computes all these products and nothing else."""
    dtype = getattr(torch, precision)
    operands = [
        (
            product.times,
            torch.rand(product.batch, product.rows, product.inner, device=device).to(dtype).squeeze(0),
            torch.rand(product.batch, product.inner, product.columns, device=device).to(dtype).squeeze(0),
        )
        for product in listed
    ]

    def multiply() -> None:
        for times, left, right in operands:
            for _ in range(times):
                left @ right

    return multiply


def counted(step: Callable[[], None]) -> int:
    """Multiply-adds of all products of matrices, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops()) // 2


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], None], times: int, device: torch.device) -> float:
    """Seconds of `work`, in the mean over so many times."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / times


def kinds(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Shares of a step's time by kind of operation."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, acc_events=True) as profiled:
        whole = seconds(step, STEPS_A_ROUND, device) * STEPS_A_ROUND * 1e6
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profiled.events() or []:
        if event.device_type.name == "CPU":
            own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            spent[kind(list(lineage(event)))] += own
    spent["the rest"] += whole - sum(spent.values())
    return {name: own / whole for name, own in spent.items()}


def lineage(event: FunctionEvent | None) -> Iterator[str]:
    """Names of an operation and of those that it is part of."""
    while event is not None:
        yield event.name
        event = event.cpu_parent


def kind(names: list[str]) -> str:
    """The kind of an operation, by its lineage: one of `KINDS`."""
    if any("Energies" in name for name in names):
        return "comparing"
    if "optimizer" in names:
        return "optimizer"
    if not PRODUCTS.isdisjoint(names):
        return "products"
    if "aten::_to_copy" in names:
        return "casting"
    return "elementwise" if names[0].startswith("aten::") else "the rest"


def check(ours: SoftAttentionDecoder, textbook: SoftAttentionReference, grids: Tensor, tokens: Tensor) -> None:
    """Make sure that both compute the same."""
    with torch.no_grad():
        for mine, its in zip(ours.eval()(grids, tokens), textbook.eval()(grids, tokens), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)
    ours.train()
    textbook.train()


def main(rounds: int = ROUNDS) -> None:
    """Print the tables of all cases."""
    device = setup_device(os.environ.get("GRIDCAP_DEVICE", "auto"))
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"training on {device}, {named}: {IMAGES} images x {CAPTIONS} captions x {WORDS} words a batch; state, "
        f"embedding and attention of {SIZE}; median of {rounds} rounds"
    )
    for case in CASES:
        for line in compared(case, device, rounds):
            print(line, flush=True)


def compared(case: Case, device: torch.device, rounds: int) -> Iterator[str]:
    """The lines of one case."""
    rows = list(rows_of(case, device))
    starts = {row.name: seconds(row.work, 1, device) for row in rows}
    taken = [{row.name: seconds(row.work, row.times, device) / row.share for row in rows} for _ in range(rounds)]
    ratios = {row.name: sorted(times[TEXTBOOK] / times[row.name] for times in taken) for row in rows}
    gains = {name: median(own) for name, own in ratios.items()}
    modes = [row for row in rows if row.name in {mode.name for mode in MODES}]
    fastest = max(modes, key=lambda row: gains[row.name])
    asked = {modes[0].name: case.float32, fastest.name: case.best}

    heading = f"{case.side**2} x {case.channels}, {case.words} words"
    yield (
        f"{heading:>32} {'captions/s':>10} {'x textbook':>10} {'from':>6} {'to':>6} {'asked':>10} {'GFLOP each':>10} "
        f"{'GFLOP/s':>8} {'of rate':>8} {'start, s':>8}"
    )
    rates = {row.name: [2e-9 * row.multiply_adds / times[row.name] for times in taken] for row in rows}
    for row in rows:
        its, full, own = rates[row.name], rates[f"{FULL}, {row.precision}"], ratios[row.name]
        yield (
            f"{row.name:>32} {median(ROWS / times[row.name] for times in taken):>10.1f} {gains[row.name]:>10.2f} "
            f"{own[0]:>6.2f} {own[-1]:>6.2f} {bar(asked.get(row.name), gains[row.name]):>10} "
            f"{2e-9 * row.multiply_adds / ROWS:>10.3f} {median(its):>8.0f} "
            f"{median(rate / highest for rate, highest in zip(its, full, strict=True)):>8.1%} {starts[row.name]:>8.1f}"
        )
    yield f"{'share of the time in':>32} " + " ".join(f"{name:>11}" for name in KINDS)
    for row in modes:
        if row.name in asked:
            yield f"{row.name:>32} " + " ".join(f"{share:>11.1%}" for share in kinds(row.work, device).values())


def bar(asked: float | None, gain: float) -> str:
    return "" if asked is None else f"{asked:g} {'met' if gain >= asked else 'missed'}"


def rows_of(case: Case, device: torch.device) -> Iterator[Row]:
    """What is timed in one case, all on the same batch."""
    torch.manual_seed(0)
    grids = torch.rand(IMAGES, case.side**2, case.channels).half().to(device)
    tokens = torch.randint(4, case.words, (IMAGES, CAPTIONS, WORDS + 1)).to(device)
    decoder = SoftAttentionDecoder(SIZES, (case.side, case.side), case.channels, case.words).to(device)
    textbook = SoftAttentionReference(decoder)
    check(decoder, textbook, grids, tokens[:, :, :-1])
    listed = list(products(case))
    cost = sum(product.multiply_adds for product in listed)

    step = step_of(textbook, torch.optim.Adam(textbook.parameters(), lr=RATE), grids, tokens, "float32")
    yield Row(TEXTBOOK, "float32", step, counted(step), times=1)
    for mode in MODES:
        if mode.compiled and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
            print(f"{mode.name:>32} skipped: compilation needs g++")
            continue
        model = copy.deepcopy(decoder)
        model.compiled = mode.compiled
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
        step = step_of(model, optimizer, grids, tokens, mode.precision)
        if mode is MODES[0]:
            assert counted(step) == cost
        yield Row(mode.name, mode.precision, step, cost)
    square = Product(1, 1, SQUARE, SQUARE, SQUARE)
    for precision in PRECISIONS:
        yield Row(f"{SINGLE_PROCESS}, {precision}", precision, multiplications(listed, precision, device), cost)
        multiply = multiplications([square], precision, device)
        yield Row(f"{FULL}, {precision}", precision, multiply, cost, share=square.multiply_adds / cost)
