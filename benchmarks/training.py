"""Training speed of a kind of decoder relative to its reference implementation, on one batch, in one run.

The reference is `pipeline/decoder/KIND_reference.py`, trained in float32 with plain Adam: a loop over steps with one
caption per row. The decoder is trained as the trainer does, with fused Adam, in each of its modes; on a GPU, the
compiled ones replay CUDA graphs of captions that are padded to a multiple of 4 steps. A step is forward, loss,
backward, gradient clipping and optimizer; dropout is equal. Each round measures every row once. Rates, speedups
and shares are medians of the rounds; `lowest` and `highest` are the extreme speedups of a round. `first step` includes
compilation.

Two rows per precision show the limits of the hardware:
- "matrix products only": the matrix products of a decoder step, in their shapes, and nothing else.
- "peak rate": as many multiply-adds in a product of 2048 x 2048 matrices. `of peak` relates every row to this rate.

A compiled mode also has the seconds that it saves in 1,000 steps, compared with the same precision without compilation:
compilation pays in a run whose steps save more than its first step takes.

For modes with a target, PyTorch's profiler gives the share of time by kind of operation:
- products: matrix products;
- scores: additive attention scores;
- elementwise: all other tensor operations, including copies and softmax;
- casting: casts between precisions;
- optimizer: gradient clipping and optimizer;
- overhead: Python and autograd, including the time in which a GPU waits for them.
On a GPU, `busy` is the share of time in which it computes instead, as CUDA graphs do not tell operations apart.

The last table divides a float32 step without compilation into the parts of the decoder, forward and backward: GFLOP of
its matrix products, share of time, rate, and rate relative to the peak rate. The rate of a part with other operations
is lower than that of its products.
- regions: layer norm, position encoding, and all projections of the regions;
- input words: word embeddings, dropout and their projection;
- attention scores: scores with coverage;
- recurrent products: projections of the state and of the context vector;
- recurrent gates: softmax, gate of the context, and LSTM;
- recurrent weights: gradients of the weights of the recurrent products, computed after the last step;
- output words: the layers between state and logits;
- optimizer: gradient clipping and optimizer;
- other: the projection of all context vectors at once, the loss, Python and autograd.
"""

import copy
import math
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.processor import describe_device, read_clock, supports
from benchmarks.workloads import decoder_params
from pipeline.captions.vocabulary import PAD
from pipeline.cuda_graphs import GraphedFunction
from pipeline.decoder import products
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
STEPS_MULTIPLE = 4
PEAK_MATRIX_SIZE = 2048
REFERENCE, PRODUCTS_ONLY, PEAK = "reference, float32", "matrix products only", "peak rate"
PRECISIONS: list[Literal["float32", "bfloat16"]] = ["float32", "bfloat16"]

PRODUCT_OPERATIONS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")
PARTS = (
    "regions",
    "input words",
    "attention scores",
    "recurrent products",
    "recurrent gates",
    "recurrent weights",
    "output words",
    "optimizer",
    "other",
)
PART_METHODS = {
    "prepare": "regions",
    "_embed": "input words",
    "_project_tokens": "input words",
    "_attention_scores": "attention scores",
    "_recurrent_step": "recurrent gates",
    "_outputs": "output words",
}
"""The methods of decoders and the parts that they compute; some decoders have no `_outputs`."""
KINDS = ("products", "scores", "elementwise", "casting", "optimizer", "overhead")


class Case(NamedTuple):
    """Grid and vocabulary size, with target speedups."""

    side: int
    """Height and width of the grid."""
    num_channels: int
    vocab_size: int
    float32_target: float
    """Target speedup of the decoder in float32, in the faster of its modes."""
    best_target: float
    """Target speedup of the fastest mode."""


CASES = [Case(7, 2048, 2500, float32_target=6, best_target=10), Case(14, 256, 1100, float32_target=5, best_target=6)]


class Mode(NamedTuple):
    """Mode of the decoder: precision, and whether attention scores are compiled."""

    name: str
    precision: Literal["float32", "bfloat16"]
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
    model: Decoder | None = None
    """The decoder that the function trains."""
    steps_per_call: float = 1.0
    """Training steps whose multiply-adds one call performs."""


class Product(NamedTuple):
    """A product of matrices [rows, inner] and [inner, columns], for `batch` pairs at once."""

    batch: int
    rows: int
    inner: int
    columns: int

    @classmethod
    def from_shapes(cls, operation: str, shapes: Iterable[Any]) -> "Product":
        """Return the product of an operation, from the shapes of its arguments: the last two are the matrices."""
        left, right = [shape for shape in shapes if len(shape) > 1][-2:]
        if operation.startswith("mkldnn"):  # rows of any number of dimensions, and a transposed weight
            return cls(1, math.prod(left[:-1]), left[-1], right[0])
        return cls(left[0] if len(left) == 3 else 1, left[-2], left[-1], right[-1])

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
        operation = func.name().partition(".")[0]
        if operation in PRODUCT_OPERATIONS:
            shapes = [argument.shape for argument in args if isinstance(argument, Tensor)]
            self.products.append(Product.from_shapes(operation, shapes))
        return func(*args, **(kwargs or {}))


def record_products(step: Callable[[], None]) -> list[Product]:
    """Return the matrix products of a training step. Attention scores involve no matrix product over the regions."""
    recorder = RecordProducts()
    with recorder:
        step()
    return recorder.products


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    grids: Tensor,
    tokens: Tensor,
    precision: str,
    replays: bool = False,
) -> Callable[[], None]:
    """Return a function that performs one training step on the batch, and replays a CUDA graph if `replays`."""
    autocast = torch.autocast(
        grids.device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=not replays
    )

    def backward(grids: Tensor, tokens: Tensor) -> Tensor:
        with autocast:
            inputs, targets = tokens[:, :, :-1], tokens[:, :, 1:]
            if isinstance(model, Decoder):
                outputs, alpha = model(grids, inputs, with_logits=False)
                loss = projected_caption_loss(outputs, model.output_proj, alpha, targets)
            else:
                logits, alpha = model(grids, inputs)
                loss = caption_loss(logits, alpha, targets)
        loss.total(loss.counts, 0.1).backward()  # type: ignore[no-untyped-call]
        return loss.cross_entropy.detach()

    gradients = GraphedFunction(backward) if replays else backward
    if replays:
        tokens = F.pad(tokens, (0, (1 - tokens.shape[2]) % STEPS_MULTIPLE), value=PAD)

    def step() -> None:
        optimizer.zero_grad(set_to_none=not replays)
        gradients(grids, tokens)
        with record_function("optimizer"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

    return step


def multiply(step_products: list[Product], precision: str, device: torch.device) -> Callable[[], None]:
    """Return a function that computes matrix products of random matrices as decoders do, and nothing else."""
    dtype = getattr(torch, precision)
    operands = [
        (
            repetitions,
            torch.rand(product.batch, product.rows, product.inner, device=device).to(dtype).squeeze(0),
            torch.rand(product.batch, product.columns, product.inner, device=device).to(dtype).mT.squeeze(0),
        )
        for product, repetitions in Counter(step_products).items()
    ]

    def multiply_all() -> None:
        for repetitions, left, right in operands:
            for _ in range(repetitions):
                products.multiply(left, right)

    return multiply_all


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` has what it needs for a device: on a CPU, a C++ compiler."""
    return device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")) is not None


def synchronize(device: torch.device) -> None:
    """Wait for all kernels of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(function: Callable[[], object], repetitions: int, device: torch.device) -> float:
    """Measure the mean seconds per call, by `read_clock`."""
    synchronize(device)
    start = read_clock(device)
    for _ in range(repetitions):
        function()
    synchronize(device)
    return (read_clock(device) - start) / repetitions


def run_steps(step: Callable[[], None], device: torch.device) -> float:
    """Perform the steps of a round and return their wall time in microseconds, the clock of the profiler."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(STEPS_PER_ROUND):
        step()
    synchronize(device)
    return 1e6 * (time.perf_counter() - start)


def profile_step(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Return the share of a step's time that each kind of operation takes."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, acc_events=True) as profiler:
        total = run_steps(step, device)
    microseconds = dict.fromkeys(KINDS, 0.0)
    for event in profiler.events() or []:
        if event.device_type.name == "CPU":
            self_time = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            microseconds[operation_kind(list(call_stack(event)))] += self_time
    microseconds["overhead"] += total - sum(microseconds.values())
    return {kind: time / total for kind, time in microseconds.items()}


def busy_share(function: Callable[[], object], device: torch.device, repetitions: int = STEPS_PER_ROUND) -> float:
    """Return the share of time in which a GPU computes, or in which the CPU is in an operator."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        total = measure(function, repetitions, device) * repetitions * 1e6
    ranges = [event.time_range for event in profiler.events() or [] if event.device_type.name == activity.name]
    busy, end = 0.0, 0.0
    for time_range in sorted(ranges, key=lambda time_range: time_range.start):
        busy += max(0.0, time_range.end - max(time_range.start, end))
        end = max(end, time_range.end)
    return busy / total


def profile_parts(decoder: Decoder, step: Callable[[], None], device: torch.device) -> dict[str, tuple[float, float]]:
    """Return the multiply-adds of each part of a step, and its share of time, by `forward` or `backward` and part.

    Args:
        decoder: The decoder that the step trains.
        step: A training step.
        device: Where it runs.
    """
    with ExitStack() as stack:
        methods = [(decoder, method, part) for method, part in PART_METHODS.items() if hasattr(decoder, method)]
        for module, method, part in [*methods, (decoder.output_proj, "forward", "output words")]:
            labeled = record_function(part)(getattr(module, method))
            stack.enter_context(patch.object(module, method, labeled))
        profiler = stack.enter_context(profile(activities=[ProfilerActivity.CPU], acc_events=True, record_shapes=True))
        total = run_steps(step, device)
    events = sorted(profiler.events() or [], key=lambda event: event.time_range.start)
    # The event that starts last with a sequence number makes the node of autograd with this number.
    forward_parts = {
        event.sequence_nr: forward_part(list(call_stack(event)))
        for event in events
        if event.sequence_nr >= 0 and not any(name.startswith("autograd::") for name in call_stack(event))
    }
    multiply_adds: defaultdict[str, float] = defaultdict(float)
    microseconds: defaultdict[str, float] = defaultdict(float)
    for event in events:
        nodes = [caller for caller in callers(event) if caller.name.startswith("autograd::engine::evaluate_function")]
        part, direction = forward_part(list(call_stack(event))), "forward"
        if nodes:
            direction = "backward"
            part = (
                "recurrent weights" if "_Deferred" in nodes[0].name else forward_parts.get(nodes[0].sequence_nr, part)
            )
        product = event_product(event)
        if part == "recurrent gates" and any(event_product(caller) for caller in callers(event)):
            part = "recurrent products"
        name = part if part in ("optimizer", "other", "recurrent weights") else f"{direction} {part}"
        microseconds[name] += event.self_cpu_time_total
        multiply_adds[name] += product.multiply_adds if product else 0
    microseconds["other"] += total - sum(microseconds.values())
    return {name: (multiply_adds[name] / STEPS_PER_ROUND, microseconds[name] / total) for name in microseconds}


def forward_part(names: list[str]) -> str:
    """Return the part of an operation of the forward pass from the names of the operation and of its callers."""
    return next((name for name in names if name in PARTS), "other")


def event_product(event: FunctionEvent) -> Product | None:
    """Return the matrix product of a profiled operation, or None if it is none."""
    if event.name not in PRODUCT_OPERATIONS:
        return None
    return Product.from_shapes(event.name, event.input_shapes)


def callers(event: FunctionEvent | None) -> Iterator[FunctionEvent]:
    """Yield an operation and its callers."""
    while event is not None:
        yield event
        event = event.cpu_parent


def call_stack(event: FunctionEvent) -> Iterator[str]:
    """Yield the names of an operation and of its callers."""
    return (caller.name for caller in callers(event))


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


def compare(
    kind: DecoderKind, case: Case, device: torch.device, rounds: int, modes: Sequence[Mode] = MODES
) -> Iterator[str]:
    """Measure one case of a kind in some modes and yield the lines of its table."""
    rows = list(table_rows(kind, case, device, modes))
    first_steps = {row.name: measure(row.function, 1, device) for row in rows}
    seconds = [  # of a training step, for each round
        {row.name: measure(row.function, row.repetitions, device) / row.steps_per_call for row in rows}
        for _ in range(rounds)
    ]
    speedups = {row.name: sorted(times[REFERENCE] / times[row.name] for times in seconds) for row in rows}
    rates = {row.name: [2e-9 * row.multiply_adds / times[row.name] for times in seconds] for row in rows}
    names = {mode.name for mode in modes}
    mode_rows = [row for row in rows if row.name in names]
    fastest = max(mode_rows, key=lambda row: median(speedups[row.name]))
    fastest_float32 = max(
        (row for row in mode_rows if row.precision == "float32"), key=lambda row: median(speedups[row.name])
    )
    targets = {fastest_float32.name: case.float32_target, fastest.name: case.best_target}

    yield f"{kind}, {case.side**2} regions x {case.num_channels}, {case.vocab_size} words"
    yield (
        f"{'':>32} {'captions/s':>10} {'speedup':>8} {'lowest':>7} {'highest':>7} {'target':>10}"
        f" {'GFLOP/caption':>13} {'GFLOP/s':>8} {'of peak':>8} {'first step, s':>13} {'saved, s':>9}"
    )
    step_seconds = {row.name: median(times[row.name] for times in seconds) for row in rows}
    for row in rows:
        speedup, peak_rates = speedups[row.name], rates[f"{PEAK}, {row.precision}"]
        of_peak = median(rate / peak for rate, peak in zip(rates[row.name], peak_rates, strict=True))
        yield (
            f"{row.name:>32} {median(NUM_CAPTIONS / times[row.name] for times in seconds):>10.1f}"
            f" {median(speedup):>8.2f} {speedup[0]:>7.2f} {speedup[-1]:>7.2f}"
            f" {describe_target(targets.get(row.name), median(speedup)):>10}"
            f" {2e-9 * row.multiply_adds / NUM_CAPTIONS:>13.3f} {median(rates[row.name]):>8.0f} {of_peak:>8.1%}"
            f" {first_steps[row.name]:>13.1f} {saved_seconds(row.name, step_seconds):>9}"
        )
    yield f"{'best mode':>32} {fastest.name}"
    if device.type == "cuda":
        yield f"{'share of time':>32} {'busy':>11}"
        for row in rows[: 1 + len(mode_rows)]:
            yield f"{row.name:>32} {busy_share(row.function, device):>11.1%}"
        return
    yield f"{'share of time':>32} " + " ".join(f"{kind:>11}" for kind in KINDS)
    for row in mode_rows:
        if row.name in targets:
            shares = profile_step(row.function, device).values()
            yield f"{row.name:>32} " + " ".join(f"{share:>11.1%}" for share in shares)
    if mode_rows[0].model is not None:
        peak = median(rates[f"{PEAK}, {mode_rows[0].precision}"])
        yield f"{f'parts of {mode_rows[0].name}':>32} {'GFLOP':>8} {'of time':>8} {'GFLOP/s':>8} {'of peak':>8}"
        for name, (multiply_adds, share) in profile_parts(mode_rows[0].model, mode_rows[0].function, device).items():
            rate = 2e-9 * multiply_adds / (share * step_seconds[mode_rows[0].name])
            of_products = f"{rate:>8.0f} {rate / peak:>8.1%}" if multiply_adds else ""
            yield f"{name:>32} {2e-9 * multiply_adds:>8.2f} {share:>8.1%} {of_products}".rstrip()


def saved_seconds(name: str, step_seconds: Mapping[str, float]) -> str:
    """Format the seconds that a compiled mode saves in 1,000 steps; empty for other rows."""
    plain = name.removesuffix(" compiled")
    return "" if plain == name else f"{1000 * (step_seconds[plain] - step_seconds[name]):.0f}"


def describe_target(target: float | None, speedup: float) -> str:
    """Format a target speedup and whether it is met; empty without a target."""
    return "" if target is None else f"{target:g} {'met' if speedup >= target else 'missed'}"


def table_rows(kind: DecoderKind, case: Case, device: torch.device, modes: Sequence[Mode]) -> Iterator[Row]:
    """Build the functions to measure in one case of a kind, all on one batch."""
    torch.manual_seed(0)
    grids = torch.rand(NUM_IMAGES, case.side**2, case.num_channels).half().to(device)
    tokens = torch.randint(4, case.vocab_size, (NUM_IMAGES, CAPTIONS_PER_IMAGE, CAPTION_LENGTH + 1)).to(device)
    params = decoder_params(embedding_size=SIZE, hidden_size=SIZE, attention_size=SIZE, dropout=0.5, kind=kind)
    decoder = build_decoder(params, (case.side, case.side), case.num_channels, case.vocab_size).to(device)
    reference = REFERENCES[kind](decoder)
    check_equal(decoder, reference, grids, tokens[:, :, :-1])

    def make_step(model: nn.Module, precision: str, fused: bool, replays: bool = False) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=fused)
        return train_step(model, optimizer, grids, tokens, precision, replays)

    def count_multiply_adds(products: list[Product]) -> int:
        return sum(product.multiply_adds for product in products)

    step = make_step(reference, "float32", fused=False)
    yield Row(REFERENCE, "float32", step, count_multiply_adds(record_products(step)), repetitions=1)
    step_products = record_products(make_step(copy.deepcopy(decoder), "float32", fused=True))
    multiply_adds = count_multiply_adds(step_products)
    for mode in modes:
        if not supports(mode.precision, device):
            print(f"{mode.name:>32} skipped: this processor has no {mode.precision} instructions")
            continue
        if mode.compiled and not can_compile(device):
            print(f"{mode.name:>32} skipped: compilation needs g++")
            continue
        model = copy.deepcopy(decoder)
        model.compiled = mode.compiled
        step = make_step(model, mode.precision, fused=True, replays=mode.compiled and device.type == "cuda")
        yield Row(mode.name, mode.precision, step, multiply_adds, model=model)
    peak_product = Product(1, PEAK_MATRIX_SIZE, PEAK_MATRIX_SIZE, PEAK_MATRIX_SIZE)
    for precision in (precision for precision in PRECISIONS if supports(precision, device)):
        yield Row(f"{PRODUCTS_ONLY}, {precision}", precision, multiply(step_products, precision, device), multiply_adds)
        function = multiply([peak_product], precision, device)
        share = peak_product.multiply_adds / multiply_adds
        yield Row(f"{PEAK}, {precision}", precision, function, multiply_adds, steps_per_call=share)
