"""The device that tensors are computed on: a command flag, because it must not change results."""

import os

import torch

from pipeline.errors import UserError


def setup_device(name: str) -> torch.device:
    """Select a device and make PyTorch deterministic.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, ... or `auto`: a GPU where there is one (under `torchrun`, the one of this local
            rank), else the CPU.

    Raises:
        UserError: This machine lacks the device.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
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
