"""Fast arithmetic of the processor, detected in one place for all benchmarks."""

import resource
import time
from collections.abc import Mapping
from typing import Any, Literal

import torch

Precision = Literal["float32", "bfloat16", "int8"]

INSTRUCTIONS: dict[Precision, tuple[str, ...]] = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm"),
}
"""Instructions for matrix products of a precision, as `torch.cpu.get_capabilities` names them; any of them suffices."""


def supports(precision: Precision, device: torch.device) -> bool:
    """Whether a device multiplies matrices of a precision by instructions of its own. Without them it is slow."""
    return device.type != "cpu" or precision not in INSTRUCTIONS or bool(_available(precision))


def describe_device(device: torch.device) -> str:
    """Name a device: the GPU, or the processor with its number of threads, its instructions, and what it lacks."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    instructions = [
        f"{precision} by {', '.join(_available(precision))}"
        if _available(precision)
        else f"no {precision} instructions"
        for precision in INSTRUCTIONS
    ]
    name = _capabilities().get("cpu_name") or "unknown processor"
    vectors = f"{torch.backends.cpu.get_cpu_capability()} float32"
    return f"{device} ({name}: {'; '.join([vectors, *instructions])}), {torch.get_num_threads()} threads"


def read_clock(device: torch.device) -> float:
    """Return seconds of a clock: wall time, or on one CPU thread (`OMP_NUM_THREADS=1`) processor time.

    Processor time, of this process and of the compilers that it ran, hardly depends on what else the machine does.
    """
    if device.type != "cpu" or torch.get_num_threads() > 1:
        return time.perf_counter()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _available(precision: Precision) -> list[str]:
    return [name for name in INSTRUCTIONS[precision] if _capabilities().get(name)]


def _capabilities() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities()
