"""The device for tensors: a command flag and not a param, because it must not change results; and copies to it."""

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

DeviceOption = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.", envvar="GRIDCAP_DEVICE")]
"""The option `--device` of every command that has one."""

T = TypeVar("T")


def setup_device(name: str) -> "torch.device":
    """Select a device and make PyTorch deterministic.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, ... or `auto`, which selects a GPU if there is one (under `torchrun`, the GPU of
            this local rank) and the CPU otherwise.

    Raises:
        UserError: This machine lacks the device.
    """
    # Imported here because the help of commands needs only `DeviceOption`.
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # `torch.use_deterministic_algorithms` would import the compiler to set its flag: a second and 116 MiB.
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch.set_deterministic_debug_mode("error")
    # Filling every new tensor with NaN helps to debug reads of uninitialized memory, but takes a third of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available on this machine ({error}). Use cpu or auto.") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of random states, streams and collectives
    return device


def to_device(values: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Copy a tensor to a device. A copy from the CPU to a GPU is from pinned memory and does not wait for the GPU."""
    return pin(values, device).to(device, non_blocking=True)


def pin(values: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Return a tensor on the CPU in pinned memory if it will be copied to a GPU, and any other tensor as it is."""
    return values.pin_memory() if device.type == "cuda" and values.device.type == "cpu" else values


def to_cpu(values: "torch.Tensor") -> "torch.Tensor":
    """Copy a tensor to the CPU, through pinned memory from a GPU, for which this waits."""
    import torch

    if values.device.type != "cuda":
        return values.cpu()
    copy = torch.empty_like(values, device="cpu", pin_memory=True)
    copy.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return copy


def copy_ahead(
    items: Iterable[tuple[T, tuple["torch.Tensor", ...]]], device: "torch.device"
) -> Iterator[tuple[T, tuple["torch.Tensor", ...]]]:
    """Copy tensors to a GPU on a stream of its own, one item ahead of the caller, while the GPU computes.

    Args:
        items: Each a value that is passed on, and its tensors in pinned memory.
        device: The GPU.

    Yields:
        Each value, and its tensors on the GPU for use on the current stream.
    """
    import torch

    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(item: tuple[T, tuple[torch.Tensor, ...]]) -> tuple[T, tuple[torch.Tensor, ...], torch.cuda.Event]:
        value, tensors = item
        with torch.cuda.stream(stream):
            return value, tuple(to_device(tensor, device) for tensor in tensors), stream.record_event()

    def finish(
        value: T, tensors: tuple[torch.Tensor, ...], copied: torch.cuda.Event
    ) -> tuple[T, tuple[torch.Tensor, ...]]:
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for tensor in tensors:
            tensor.record_stream(current)
        return value, tensors

    remaining = map(start, items)
    ahead = next(remaining, None)
    while ahead is not None:
        item, ahead = ahead, next(remaining, None)
        yield finish(*item)
