"""Selection of the device for tensors: a command flag and not a param, because it must not change results."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

DeviceOption = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.", envvar="GRIDCAP_DEVICE")]
"""The option `--device` of every command that has one."""


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
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available on this machine ({error}). Use cpu or auto.") from error
