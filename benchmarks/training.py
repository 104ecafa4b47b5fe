"""Training speed of a kind of decoder relative to its reference implementation, on one batch, in one run.

The reference is `pipeline/decoder/KIND_reference.py`, trained in float32 with plain Adam: a loop over steps with one
caption per row. The decoder is trained as the trainer does, with fused Adam, in each of its modes. A step is forward,
loss, backward, gradient clipping and optimizer; dropout is equal. Each round measures every row once. Rates, speedups
and shares are medians of the rounds; `lowest` and `highest` are the extreme speedups of a round. `first step` includes
compilation.

Two rows per precision show the limits of the hardware:
- "matrix products only": the matrix products of a decoder step, in their shapes, and nothing else.
- "peak rate": as many multiply-adds in a product of 2048 x 2048 matrices. `of peak` relates every row to this rate.

For modes with a target, PyTorch's profiler gives the share of time by kind of operation:
- products: matrix products;
- scores: additive attention scores;
- elementwise: all other tensor operations, including copies and softmax;
- casting: casts between precisions;
- optimizer: gradient clipping and optimizer;
- overhead: Python and autograd, including the time in which a GPU waits for them.
"""

import copy
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.workloads import decoder_params
from pipeline.decoder.decoder import Decoder, DecoderKind
from pipeline.decoder.decoder_reference import DecoderReference
from pipeline.decoder.references import REFERENCES
from pipeline.decoder.registry import DECODERS, build_decoder
from pipeline.device import setup_device
from pipeline.training.loss import caption_loss, projected_caption_loss

NUM_IMAGES, CAPTIONS_PER_IMAGE, CAPTION_LENGTH, SIZE = 16, 5, 13, 512
NUM_CAPTIONS = NUM_IMAGES * CAPTIONS_PER_IMAGE
LEARNING_RATE = 4e-4
ROUNDS, STEPS_PER_ROUND = 5, 4
PEAK_MATRIX_SIZE = 2048
REFERENCE, PRODUCTS_ONLY, PEAK = "reference, float32", "matrix products only", "peak rate"
PRECISIONS = ["float32", "bfloat16"]

PRODUCT_OPERATIONS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
KINDS = ("products", "scores", "elementwise", "casting", "optimizer", "overhead")


class Case(NamedTuple):
    """Grid and vocabulary size, with target speedups."""

    side: int
    """Height and width of the grid."""
    num_channels: int
    vocab_size: int
    float32_target: float
    """Target speedup of the decoder in float32, not compiled."""
    best_target: float
    """Target speedup of the fastest mode."""


CASES = [Case(7, 2048, 2500, float32_target=4, best_target=10), Case(14, 256, 1100, float32_target=4, best_target=6)]


class Mode(NamedTuple):
    """Mode of the decoder: precision, and whether attention scores are compiled."""

    name: str
    precision: str
    compiled: bool


MODES = [
    Mode("decoder, float32", "float32", False),
    Mode("decoder, float32 compiled", "float32", True),
    Mode("decoder, bfloat16", "bfloat16", False),
    Mode("decoder, bfloat16 compiled", "bfloat16", True),
]


class Row(NamedTuple):
    """A row of the table with the function that it measures."""

    name: str
    precision: str
    function: Callable[[], None]
    multiply_adds: int
    """Multiply-adds of a training step."""
    repetitions: int = STEPS_PER_ROUND
    """Calls per round."""
    steps_per_call: float = 1.0
    """Training steps whose multiply-adds one call performs."""


class Product(NamedTuple):
    """A product of matrices [rows, inner] and [inner, columns], for `batch` pairs at once."""

    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the product."""
        return self.batch * self.rows * self.inner * self.columns


class RecordProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the matrix products that are computed while it is active, forward and backward."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().partition(".")[0] in PRODUCT_OPERATIONS:
            left, right = [argument.shape for argument in args if isinstance(argument, Tensor)][-2:]
            batch = left[0] if len(left) == 3 else 1
            self.products.append(Product(batch, left[-2], left[-1], right[-1]))
        return func(*args, **(kwargs or {}))


def record_products(step: Callable[[], None]) -> list[Product]:
    """Return the matrix products of a training step. Attention scores involve no matrix product over the regions."""
    recorder = RecordProducts()
    with recorder:
        step()
    return recorder.products


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, grids: Tensor, tokens: Tensor, precision: str
) -> Callable[[], None]:
    """Return a function that performs one training step on the batch."""

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        inputs, targets = tokens[:, :, :-1], tokens[:, :, 1:]
        with torch.autocast(grids.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            if isinstance(model, Decoder):
                outputs, alpha = model(grids, inputs, with_logits=False)
                loss = projected_caption_loss(outputs, model.output_proj, alpha, targets)
            else:
                logits, alpha = model(grids, inputs)
                loss = caption_loss(logits, alpha, targets)
        loss.total(loss.counts, 0.1).backward()  # type: ignore[no-untyped-call]
        with record_function("optimizer"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

    return step


def multiply(step_products: list[Product], precision: str, device: torch.device) -> Callable[[], None]:
    """Return a function that computes matrix products of random matrices and nothing else."""
    dtype = getattr(torch, precision)
    operands = [
        (
            repetitions,
            torch.rand(product.batch, product.rows, product.inner, device=device).to(dtype).squeeze(0),
            torch.rand(product.batch, product.inner, product.columns, device=device).to(dtype).squeeze(0),
        )
        for product, repetitions in Counter(step_products).items()
    ]

    def multiply_all() -> None:
        for repetitions, left, right in operands:
            for _ in range(repetitions):
                left @ right

    return multiply_all


def describe_device(device: torch.device) -> str:
    """Name a device with its GPU or its number of threads."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device}, {hardware}"


def synchronize(device: torch.device) -> None:
    """Wait for all kernels of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(function: Callable[[], object], repetitions: int, device: torch.device) -> float:
    """Measure the mean seconds per call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repetitions):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / repetitions


def profile_step(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Return the share of a step's time that each kind of operation takes."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, acc_events=True) as profiler:
        total = measure(step, STEPS_PER_ROUND, device) * STEPS_PER_ROUND * 1e6
    microseconds = dict.fromkeys(KINDS, 0.0)
    for event in profiler.events() or []:
        if event.device_type.name == "CPU":
            self_time = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            microseconds[operation_kind(list(call_stack(event)))] += self_time
    microseconds["overhead"] += total - sum(microseconds.values())
    return {kind: time / total for kind, time in microseconds.items()}


def call_stack(event: FunctionEvent | None) -> Iterator[str]:
    """Yield the names of an operation and of its callers."""
    while event is not None:
        yield event.name
        event = event.cpu_parent


def operation_kind(names: list[str]) -> str:
    """Return the kind of an operation, one of `KINDS`, from the names of the operation and of its callers."""
    if any("AdditiveScores" in name for name in names):
        return "scores"
    if "optimizer" in names:
        return "optimizer"
    if not set(PRODUCT_OPERATIONS).isdisjoint(names):
        return "products"
    if "aten::_to_copy" in names:
        return "casting"
    return "elementwise" if names[0].startswith("aten::") else "overhead"


def check_equal(decoder: Decoder, reference: DecoderReference, grids: Tensor, tokens: Tensor) -> None:
    """Check that the outputs of decoder and reference are equal up to rounding."""
    with torch.no_grad():
        for output, expected in zip(decoder.eval()(grids, tokens), reference.eval()(grids, tokens), strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    decoder.train()
    reference.train()


def main(kinds: Sequence[str] = (), rounds: int = ROUNDS) -> None:
    """Print a table for each case of some kinds of decoders; none means all kinds."""
    if unknown := set(kinds) - set(DECODERS):
        raise SystemExit(f"--kind: must be one of {', '.join(DECODERS)}, got {', '.join(sorted(unknown))}")
    device = setup_device(os.environ.get("GRIDCAP_DEVICE", "auto"))
    print(
        f"training on {describe_device(device)}: batches of {NUM_IMAGES} images x {CAPTIONS_PER_IMAGE} captions x"
        f" {CAPTION_LENGTH} words; attention, embedding and hidden size {SIZE}; median of {rounds} rounds"
    )
    for kind in (kind for kind in DECODERS if not kinds or kind in kinds):
        for case in CASES:
            for line in compare(kind, case, device, rounds):
                print(line, flush=True)


def compare(kind: DecoderKind, case: Case, device: torch.device, rounds: int) -> Iterator[str]:
    """Measure one case of a kind and yield the lines of its table."""
    rows = list(table_rows(kind, case, device))
    first_steps = {row.name: measure(row.function, 1, device) for row in rows}
    seconds = [  # of a training step, for each round
        {row.name: measure(row.function, row.repetitions, device) / row.steps_per_call for row in rows}
        for _ in range(rounds)
    ]
    speedups = {row.name: sorted(times[REFERENCE] / times[row.name] for times in seconds) for row in rows}
    rates = {row.name: [2e-9 * row.multiply_adds / times[row.name] for times in seconds] for row in rows}
    mode_names = {mode.name for mode in MODES}
    modes = [row for row in rows if row.name in mode_names]
    fastest = max(modes, key=lambda row: median(speedups[row.name]))
    targets = {modes[0].name: case.float32_target, fastest.name: case.best_target}

    yield f"{kind}, {case.side**2} regions x {case.num_channels}, {case.vocab_size} words"
    yield (
        f"{'':>32} {'captions/s':>10} {'speedup':>8} {'lowest':>7} {'highest':>7} {'target':>10}"
        f" {'GFLOP/caption':>13} {'GFLOP/s':>8} {'of peak':>8} {'first step, s':>13}"
    )
    for row in rows:
        speedup, peak_rates = speedups[row.name], rates[f"{PEAK}, {row.precision}"]
        of_peak = median(rate / peak for rate, peak in zip(rates[row.name], peak_rates, strict=True))
        yield (
            f"{row.name:>32} {median(NUM_CAPTIONS / times[row.name] for times in seconds):>10.1f}"
            f" {median(speedup):>8.2f} {speedup[0]:>7.2f} {speedup[-1]:>7.2f}"
            f" {describe_target(targets.get(row.name), median(speedup)):>10}"
            f" {2e-9 * row.multiply_adds / NUM_CAPTIONS:>13.3f} {median(rates[row.name]):>8.0f} {of_peak:>8.1%}"
            f" {first_steps[row.name]:>13.1f}"
        )
    yield f"{'share of time':>32} " + " ".join(f"{kind:>11}" for kind in KINDS)
    for row in modes:
        if row.name in targets:
            shares = profile_step(row.function, device).values()
            yield f"{row.name:>32} " + " ".join(f"{share:>11.1%}" for share in shares)


def describe_target(target: float | None, speedup: float) -> str:
    """Format a target speedup and whether it is met; empty without a target."""
    return "" if target is None else f"{target:g} {'met' if speedup >= target else 'missed'}"


def table_rows(kind: DecoderKind, case: Case, device: torch.device) -> Iterator[Row]:
    """Build the functions to measure in one case of a kind, all on one batch."""
    torch.manual_seed(0)
    grids = torch.rand(NUM_IMAGES, case.side**2, case.num_channels).half().to(device)
    tokens = torch.randint(4, case.vocab_size, (NUM_IMAGES, CAPTIONS_PER_IMAGE, CAPTION_LENGTH + 1)).to(device)
    params = decoder_params(embedding_size=SIZE, hidden_size=SIZE, attention_size=SIZE, dropout=0.5, kind=kind)
    decoder = build_decoder(params, (case.side, case.side), case.num_channels, case.vocab_size).to(device)
    reference = REFERENCES[kind](decoder)
    check_equal(decoder, reference, grids, tokens[:, :, :-1])

    def make_step(model: nn.Module, precision: str, fused: bool) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=fused)
        return train_step(model, optimizer, grids, tokens, precision)

    def count_multiply_adds(products: list[Product]) -> int:
        return sum(product.multiply_adds for product in products)

    step = make_step(reference, "float32", fused=False)
    yield Row(REFERENCE, "float32", step, count_multiply_adds(record_products(step)), repetitions=1)
    step_products = record_products(make_step(copy.deepcopy(decoder), "float32", fused=True))
    multiply_adds = count_multiply_adds(step_products)
    for mode in MODES:
        if mode.compiled and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
            print(f"{mode.name:>32} skipped: compilation needs g++")
            continue
        model = copy.deepcopy(decoder)
        model.compiled = mode.compiled
        yield Row(mode.name, mode.precision, make_step(model, mode.precision, fused=True), multiply_adds)
    peak_product = Product(1, PEAK_MATRIX_SIZE, PEAK_MATRIX_SIZE, PEAK_MATRIX_SIZE)
    for precision in PRECISIONS:
        yield Row(f"{PRODUCTS_ONLY}, {precision}", precision, multiply(step_products, precision, device), multiply_adds)
        function = multiply([peak_product], precision, device)
        share = peak_product.multiply_adds / multiply_adds
        yield Row(f"{PEAK}, {precision}", precision, function, multiply_adds, steps_per_call=share)
